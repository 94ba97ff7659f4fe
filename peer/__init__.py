"""Serving a span of a model's blocks to the swarm.

commands        what people type: `peer serve`, `status`, `demo`, ...
server          a peer's life, from joining to leaving
sharer          what any member does about weights: gives, fetches, announces
doctor          `peer doctor`: checks that find why joining, serving or using fails
start           once, before anyone is served: which blocks, their loading, what is tried out
service         speaks the wire: a file per group of messages
generation      steps of generations, many sessions in one trunk pass
training        forwards and backwards, kept activations
adapters        clients' adapters
weights         models' files for other members
base_weights    what clients may ask about the base model's weights
span            the model's own trunk with foreign blocks skipped
kv_cache        sessions' keys and values in bounded memory
compute         one thread, and whose turn it is
"""

from protocol.machine.openmp import spin_briefly

spin_briefly()
