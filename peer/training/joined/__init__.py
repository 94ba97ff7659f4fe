"""Training calls of several clients, run together.

    together        what `peer.training.runner` needs to know of it
    products        the linear layers at which calls meet: one product for all
    side_by_side    threads that take turns, and meet

It pays for calls of few tokens, and for quantized weights (docs/performance.md, "Training calls of several clients").

All of this can be taken out whole. Delete this folder, `tests/peer/test_joined_calls.py` and
`benchmarks/joined_calls.py`; in `peer.start.assembly` the import of `Together` and the second argument of
`TrainingRunner`; in `peer.training.runner` the import, the argument `together` and what asks it, `Task.beside` and
`Task.group`; in `peer.training.trainer` `Adding`, the arguments `adding`, `TrainingCall.meets` and `Trainer.meets`.
"""
