"""A span: some blocks of a model, run by the model's own code with the other blocks skipped.

    span        the span itself, and what a trunk pass is run on (`Inputs`, `Mode`, `Adapted`)
    block_types which blocks are alike, so that one of them stands for all
    failures    out of memory, or a broken device: what a failure of torch's own means
    loading     fetches, reads and quantizes just the span's tensors
    cut         what a model is cut down to, and the block list that skips blocks
    rotary      "dynamic" rotary embeddings, which must not remember other clients' lengths
    checks      what clients send, checked before it reaches the span
    transfer    tensors between this process's memory and a GPU

What replaces forwards or attention of a trunk is in `protocol.model.forwards`, and nowhere else.
"""
