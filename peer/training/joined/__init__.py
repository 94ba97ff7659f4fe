"""Training calls of several clients, run together.

    together        what `peer.training.runner` needs to know of it
    products        the linear layers at which calls meet: one product for all
    side_by_side    threads that take turns, and meet

It pays for calls of few tokens, and for quantized weights (docs/performance.md, "Training calls of several clients").

All of this can be taken out whole. Delete this folder, `tests/peer/test_joined_calls.py`,
`benchmarks/joined_calls.py` and the test of `Products` in `tests/protocol/test_split_linear.py`; in
`peer.start.assembly` (and in `tests/tools/fuzzing/handlers.py`) the import of `Together` and the second argument of
`TrainingRunner`; in `peer.training.runner` the import, the argument `together` and what asks it, `Task.beside`,
`Task.prepare` and `Task.group`; in `peer.training.trainer` `Adding` and the arguments `adding`; every `meets`.

How calls meet. Small forwards and backwards that wait at the same time (up to 64 tokens on CPUs, 512 on GPUs, and as
much again riding along) each run the trunk on a thread of their own, one at a time, until they come to a linear
layer. When all wait at one, its product is computed for all in one go. So each call has its own masks, its own
adapter, and its own autograd graph, in whose backward it meets the calls that are there then. A client that never
sends its backward holds its own activations only.

- Every family joins, because nothing about masks or caches needs to be known. Modules that are not plain, Conv1D or
  nf4 linear layers (fused experts; int8, which looks for outliers in all tokens of a product) are run by each call
  for itself.
- Calls of the same blocks and training flag join, without an adapter or with any plain LoRA. Dropout, autocast,
  prefixes, other adapters and large calls run alone. A call without company is computed as plain PEFT does, bit for
  bit.
- One packed graph for several calls would make the first pay for the others' backward, and hold the memory of all
  until the last has come. Keeping inputs and computing forward again would cost each call a third reading of the
  weights.
- What goes wrong with one call is its own. What fails for several at once (memory) is tried for each alone.
"""
