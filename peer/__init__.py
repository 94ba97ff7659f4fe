"""Serving a span of a model's blocks to the swarm."""

import os

# Before torch loads OpenMP. Idle threads that spin take the cores from other peers and the client on the same machine:
# a LoRA step of 4 x 512 tokens over two peers with two threads each on two cores ran 1.3 times as fast without. But
# threads that sleep at once must be woken for each of a step's products, which costs more than they save. So GNU's
# OpenMP, that of torch on Linux, spins for 0.2 ms, somewhat longer than Python takes from one product to the next;
# others, which know no such short time, not at all.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "6000")
