"""Training calls of several clients, run together.

    together        what `peer.training.runner` needs to know of it
    products        the linear layers at which calls meet: one product for all
    side_by_side    threads that take turns, and meet

It pays for calls of few tokens, and for quantized weights (docs/performance.md, "Training calls of several clients").

All of this can be taken out whole. Delete this folder, `tests/peer/test_joined_calls.py`,
`benchmarks/joined_calls.py` and the test of `Products` in `tests/protocol/test_split_linear.py`; in
`peer.start.assembly` (and in `tests/tools/fuzzing/handlers.py`) the import of `Together` and the second argument of
`TrainingRunner`; in `peer.training.runner` the import, the argument `together` and what asks it, `Task.beside` and
`Task.group`; in `peer.training.trainer` `Adding`, the arguments `adding`, and every `meets`.
"""
