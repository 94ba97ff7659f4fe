"""`peer merge`: an adapter merged into its base model, one module at a time: the model is never in memory whole.

run      the way through: what is asked, what is written
adapter  the adapter's folder, and PEFT's injection of it into stubs
base     the base's files; names: checkpoint names against module names
plan     which tensors come from where; write: shards, streamed
"""
