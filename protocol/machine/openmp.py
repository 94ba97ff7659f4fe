"""OpenMP's threads, by which torch computes on CPUs."""

import os


def spin_briefly() -> None:
    """Have this process's idle threads spin for 0.2 ms, unless its user has said how long. To be called before torch
    loads OpenMP; later it does nothing.

    Left alone, they spin for 10 ms, and take the cores from other peers and the client on the same machine: a LoRA step
    of 4 x 512 tokens over two peers with two threads each on two cores ran 1.3 times as fast without. But threads that
    sleep at once must be woken for each of a step's products, which costs more than they save. So GNU's OpenMP, that of
    torch on Linux, spins for somewhat longer than Python takes from one product to the next; others, which know no such
    short time, not at all.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "6000")
