"""Once, before anyone is served: why a peer takes so long to start.

    options         what `peer serve` is told, each option declared once
    last_served     what a member of a private swarm served last, for a start with nothing typed
    placement       which blocks to serve, if the user has not said
    assembly        loads the span and puts together what serves it
    memory          what is free, and what it is used for
    speed           measures the span, for its record
    arena_trial     whether the KV caches can lie in one arena
    joining_trial   in which way steps of several sessions can share a trunk pass
    compile_trial   with `--compile`: whether compiled steps are right and pay
    trial           what the three trials have in common

Whether linear layers are split over threads is tried in `protocol.model.split_linear`, which clients use too.
"""
