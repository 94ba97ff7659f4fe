"""The run itself: any Transformers causal language model, trained by `Trainer`, stopped and continued at will.

run          the way through: adapter, training, adapter saved, plot and samples
dataset      the rows to train and validate on, and the batches made of them
plan         what the run will do, before it does it
trainer      `Trainer` with checkpoints that are whole, and evaluations that draw no random numbers
state        every tensor and random state that an exact continuation needs
checkpoints  checkpoints that are whole or not there
interrupts   Ctrl-C that waits while a step or a checkpoint is under way
output       the output folder, and writing that leaves nothing half done
progress     log.jsonl and the progress bar; plot: loss.png; samples: samples.md
"""
