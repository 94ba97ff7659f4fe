"""Serving a span of a model's blocks to the swarm."""

from protocol.machine.openmp import spin_briefly

spin_briefly()
