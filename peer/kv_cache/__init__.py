"""The KV caches of all generations on a peer, in memory that is bounded and shared.

- `session`: one generation's state, and `prepare`, which makes it ready for a step
- `memory`: the tokens that all sessions share; limits, and who gives way when there are too few
- `slots`: which slots belong to whom; moving them together when free ones are scattered
- `arena`: the tensors that the slots lie in, and Transformers' cache layers as views of them
- `span_cache`: Transformers' cache as the trunk sees it, of a span's layers
- `edits`: clients' edits (crop, reorder, repeat, select), which `protocol.cache_edits` defines
"""
