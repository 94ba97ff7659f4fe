"""What people type. The only place in `peer` that may use `client`, and only from inside a function.

    app             the `peer` command, `peer bootstrap`, `peer status`; exit codes
    serve           `peer serve`
    supervisor      several peers of one command, and peers that are started again
    status          how `peer status` shows a swarm
    swarm           `peer swarm`: the private swarms that this machine knows
    invite          `peer invite`: tickets; members: `peer join`, `members`, `revoke`
    weights         `peer share`, `peer cache`
    demo            `peer demo`: a swarm on this machine, and a fine-tuning through it
    sample_model    the small model of the demo
    options         `--config`, options from the fields of a dataclass, the client's commands
    process         running until told to stop

Importing these imports neither torch nor Transformers: `peer --help` must not wait for them.
"""
