"""One trunk pass for the steps of several sessions: a batched pass.

    batched_pass    the pass, its members, and what a way to run it must offer
    appending       the keys and values of a packed pass into the arena
    packing         the usual way: all tokens as one row, attention session by session
    lockstep        for architectures that cannot be packed: greenlets that meet at each block
    lora_rows       LoRA of different clients in one pass
    compiled        packing with compiled blocks: `peer serve --compile`

`compiled` can be taken out whole. Delete `compiled.py` here, `peer/start/compile_trial.py`,
`tests/peer/test_compiled.py` and `ServeOptions.compile` (with `--compile` of `benchmarks.core`); in
`peer.start.assembly` have `_step_runner` return `StepRunner(span, adapters, find_joiner(span), trainer.give_way)`; in
`peer.generation.steps` drop `StepRunner`'s argument `compiled` and the two places that ask it, and in
`tests/peer/test_packing.py` what gives it. (`SplitLinear` asks whether it is being compiled for clients, too: their
users may compile their models.)

How steps are joined. When a step's turn comes, the compute thread takes along other steps that wait, of all clients:
decode steps, and chunks of prompts while they cost little beside the weights that are read anyhow (64 tokens on CPUs,
512 on GPUs; the step whose turn it is may be of any size). Each client is charged its part of the time, by tokens.

- Packed: all tokens lie end to end as one row, so linear layers, norms, rotary embeddings and experts run once over
  all of them. For the time of the pass the model's attention function is replaced by one that goes session by
  session: it puts the new keys and values into that session's cache and calls the model's own function, with the mask
  that Transformers makes for that session alone. So windows, padding, soft caps, sinks, several rows and every kind
  of cache layer stay Transformers' business.
- In lockstep: each session's trunk runs in a greenlet as it would alone, and stops at each block until the others are
  there. The block runs once over the row of all tokens. Inputs that are not tokens (mask, alibi, cache) pass through
  it to the attention module, which runs for each session in a greenlet again; these wait for each other at its linear
  layers. This costs more Python than packing, so it is the second choice.
- Other adapters go along if they are plain LoRA: the base runs once, and its linear layers add `scaling * B(A(x))` to
  each session's tokens. Sessions with the same adapter of another kind join each other. Autocast and training mode
  run alone.

Who joins is found out at load by trying one block of each type: short sequences together and alone must agree to 2e-5
(5e-2 in 16 bits or quantized). Packed: opt, gpt2, gpt_neox, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma2,
gemma3, phi3, glm4, gpt_oss, granite, olmo2, cohere2, smollm3. In lockstep: bloom (it makes alibi from the mask),
falcon (its attention does arithmetic on the mask), deepseek_v3 (it expands keys after the cache), llama4 (its chunked
mask looks at the whole batch's padding), linear attention (qwen3_next), and rotary embeddings that depend on the
longest sequence. What neither way serves runs alone, and the log says why. A joined step differs from one alone by
the rounding of a product of several rows; a step that runs alone, as every step of a single stream does, is what
plain Transformers gives, bit for bit.

What goes wrong with one session ends its step only. When the pass itself fails, each step is run alone, unless caches
have taken tokens already: then those sessions are lost (`SessionLost`), and their clients send their tokens again.
"""
