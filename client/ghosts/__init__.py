"""Weights that live on remote peers: what stands in for them on this machine, and what peers are asked about them.

    tensor      `GhostTensor`: shape and dtype of a weight, without values; PEFT and Transformers see an ordinary tensor
    blocks      ghosts for all weights of a model's blocks, and the list of blocks that the model iterates over
    questions   what may be asked about a remote weight (norms, factors), and what has been subtracted from it
    norms       row norms, for DoRA: `ReadWeight` requests
    factors     leading factors, for PiSSA and OLoRA: `Factorize` requests

A ghost asks through a `WeightReader`, which the builder of a model makes of the two caches; so ghosts know no swarm.
"""
