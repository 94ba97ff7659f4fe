"""What a GPU does with the product, in a few minutes: whether it is right, how fast, and what was left off.

    __main__    `python -m benchmarks.gpu`: the sections, one after the other
    report      figures: printed and saved when they are known; one table at the end
    gpu         the device: time, memory
    models      random weights of models that nobody has to download, some of which no card could hold
    peers       peers in this process
    info        section: versions, the card, what it can do at best, what a copy costs, whether memory can be pinned
    parity      section: a swarm's logits, tokens, losses and gradients against local Transformers and PEFT
    waits       section: what must not wait for the GPU, nor run ahead of it
    blocks      section: blocks of BLOOM-176B's shape and others: time, memory, and the steps per second that follow
    trials      ... and which trials of a span came out how, and why
    speed       section: a 7B llama, local and through peers on the same card, alone and in a crowd

Nothing is downloaded, and nothing leaves the machine.
"""
