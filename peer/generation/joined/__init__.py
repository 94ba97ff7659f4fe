"""One trunk pass for the steps of several sessions: a batched pass.

    batched_pass    the pass, its members, and what a way to run it must offer
    packing         the usual way: all tokens as one row, attention session by session
    lockstep        for architectures that cannot be packed: greenlets that meet at each block
    lora_rows       LoRA of different clients in one pass
    compiled        packing with compiled blocks: `peer serve --compile`

`compiled` can be taken out whole. Delete `compiled.py` here, `peer/start/compile_trial.py`,
`tests/peer/test_compiled.py` and `ServeOptions.compile` (with `--compile` of `benchmarks.core`); in
`peer.start.assembly` have `_step_runner` return `StepRunner(span, adapters, find_joiner(span))`; in
`peer.generation.steps` drop `StepRunner`'s argument `compiled` and the two places that ask it, and in
`tests/peer/test_packing.py` what gives it. (`SplitLinear` asks whether it is being compiled for clients, too: their
users may compile their models.)
"""
