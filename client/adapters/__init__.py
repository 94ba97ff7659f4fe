"""The adapters that PEFT put on the ghost blocks: found, watched for changes, described for peers.

    source        `AdapterSource`: the active adapters now, as a `Snapshot`; called by every forward through the model
    watch         whether anything has changed since the last snapshot; refuses changes that would have no effect
    original      the blocks as they were loaded, and what has become of them since
    attributes    comparing attributes of thousands of objects without a Python call for each
    peft_layers   what PEFT's layers say of themselves: active adapters, their order, their tensors
    spec          one adapter as the wire describes it; refuses what does not work through a swarm
    dropout       which dropout is live, of adapters and of the blocks themselves
    residual      what PiSSA and OLoRA subtracted from the weights, as one more adapter
    bundle        `Snapshot`, and the `AdapterBundle` of one span, with the content hash that peers know it by

Importing this package does not import PEFT, which takes seconds to load.
"""
