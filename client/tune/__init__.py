"""A fine-tuning run described by one file: `peer tune CONFIG.yaml`.

The way through a run, one module each:

    config, adapters, example   what the user wrote, checked; PEFT's methods and their options
    data -> formats -> render -> encode -> packing -> dataset
                                files to records, records to text, text to token ids and labels, rows, batches
    plan                        what the run will do, before it does it
    run                         the run itself: `Trainer` around any Transformers causal language model
    trainer, checkpoints, interrupts, progress, output, plot, samples
                                what the run is made of

Importing this package imports none of them: PEFT and Transformers take seconds to load.
"""
