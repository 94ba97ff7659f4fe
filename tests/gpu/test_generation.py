"""Peers on the GPU, and a client that stays on the CPU."""

import torch

from tests.tools.swarm import Both

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_same_tokens(llamas: Both) -> None:
    ids = torch.randint(3, 100, (2, 8))
    assert torch.equal(llamas.remote().generate(ids, **GREEDY), llamas.local().generate(ids, **GREEDY))
