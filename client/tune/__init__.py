"""A fine-tuning run described by one file: `peer tune CONFIG.yaml`. It trains any Transformers model, remote or local.

The way through a run, a folder each:

    description  what the user wrote, checked: the keys of the file, PEFT's methods and their options
    data         files to records, records to text, text to token ids and labels, short sequences packed into rows
    running      the plan, the training itself around `Trainer`, and all that is written into the output folder
    errors       what can go wrong for a reason that the user can mend

`client.commands.tune` joins them with a swarm. Importing this package imports none of them: PEFT and Transformers take
seconds to load.
"""
