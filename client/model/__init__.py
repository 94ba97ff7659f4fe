"""A Transformers model whose blocks are elsewhere, made and kept so that users see an ordinary model.

load            the model that a user asked for: options checked, checkpoint opened, swarm joined
options         arguments of `from_pretrained` about files, devices and kernels: what they mean here
build           the Hugging Face class itself, with ghosts in the place of its blocks
handle          `SwarmHandle`: what `model.swarm` shows
pseudo_layer    what the trunk's loop over blocks runs: all of them at once, remotely
remote_blocks   `RemoteBlocks`: the blocks as a differentiable function; training calls and sessions start here
crossing        between the user's device and what goes through the swarm: one wait each way
remote_cache    the KV cache as Transformers sees it: a length, and edits that travel with the next step
petals          Petals' sessions and trained prompts
parallel        several processes that train one adapter, by DistributedDataParallel
saving          what this machine holds of the model, saved and loaded without PEFT
"""
