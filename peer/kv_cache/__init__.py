"""The KV caches of all generations on a peer, in memory that is bounded and shared.

- `session`: one generation's state, and `prepare`, which makes it ready for a step
- `memory`: the tokens that all sessions share; limits, and who gives way when there are too few
- `slots`: which slots belong to whom; moving them together when free ones are scattered
- `arena`: the tensors that the slots lie in, and Transformers' cache layers as views of them
- `span_cache`: Transformers' cache as the trunk sees it, of a span's layers
- `edits`: clients' edits (crop, reorder, repeat, select), which `protocol.cache_edits` defines

All tokens lie in one arena: for each block a tensor of keys and one of values, allocated once. (On a CPU the kernel
commits pages when they are touched, and gets those of ended sessions back.) A slot is room for one token of one row
in all blocks; a session owns a run of slots and attends to views of it. What is counted is what is taken. A session
is let in if so many slots are free, and free slots can always be had, because runs are slid together when the holes
are too small. A run holds at most 1.3 times the tokens in it and a page of 16 slots per row. Runs grow and move on
the compute thread, between steps; a session that ends during a step keeps its run until the step has ended. States of
linear attention, and what autocast or an adapter caches in another dtype, are Transformers' own tensors, counted
alike. At load a span is run with the arena and without it; if the results are not equal bit by bit (on a GPU: but for
rounding), it runs without.
"""
