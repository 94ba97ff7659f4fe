"""OpenMP's threads, by which torch computes on CPUs."""

import os


def spin_briefly() -> None:
    """Idle OpenMP threads of this process spin for 0.2 ms, unless the user's environment says how long.

    Must be called before torch loads OpenMP; later it has no effect.

    By default the threads spin for 10 ms, which takes the cores from other peers and from the client on the same
    machine: a LoRA step of 4 x 512 tokens over two peers with two threads each, on two cores, ran 1.3 times as fast
    without it. Threads that sleep at once must be woken for each matrix product of a step, which costs more than it
    saves. So GNU's OpenMP, which torch uses on Linux, spins a little longer than Python takes from one product to the
    next. Other OpenMPs know no such short time: their threads do not spin.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "6000")
