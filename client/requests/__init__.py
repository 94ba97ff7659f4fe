"""Asking peers: what a request consists of, the adapters that it needs, and whether its answer can be trusted.

caller      `Caller`: one request and its answer; forward and backward of one hop; owns the puts and the verifier
work        `Work`: how hidden states are to be taken through blocks, and how that is put into messages
puts        which adapters were given to which peers of late
handover    `Boundary`: results that peers hand to each other, without a detour by way of the client
verify      `Verifier`: compares a share of the answers with those of other peers, and condemns liars
recompute   those answers: a hop's forward or backward computed again by others
"""
