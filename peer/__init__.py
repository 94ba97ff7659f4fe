"""Serving a span of a model's blocks to the swarm."""

import os

# Before torch loads OpenMP: idle threads that spin for long take the cores from other peers and the client on the same
# machine. A LoRA step of 4 x 512 tokens over two peers with two threads each on two cores ran 1.3 times as fast
# without. GNU's may spin for about 0.2 ms: waking sleeping threads for every small product slows a decode step down.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
