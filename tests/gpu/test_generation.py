"""Real peers whose spans are on the GPU, and a client that stays on the CPU."""

from collections.abc import Callable
from pathlib import Path

import torch

from tests.tools.swarm import Both, ForkServer, new_swarm

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_same_tokens(fork_server: ForkServer, device: torch.device, models: Callable[[str], Path]) -> None:
    with new_swarm(fork_server) as swarm:
        swarm.serve(models("llama"), "0:2", "2:5", options=("--device", str(device)))
        both = Both(models("llama"), swarm)
        ids = torch.randint(3, 100, (2, 8))
        assert torch.equal(both.remote().generate(ids, **GREEDY), both.local().generate(ids, **GREEDY))
