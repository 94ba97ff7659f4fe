"""Peers that have next to no memory for one call in ten: the short form of `benchmarks.chaos --scarce-memory`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loads import Talk, train, with_lora
from tests.tools.swarm import Both, ForkServer, new_swarm


def test_every_token_and_every_loss(
    fork_server: ForkServer, pretended: Any, device: torch.device, models: Callable[[str], Path]
) -> None:
    with new_swarm(fork_server) as swarm:
        spans, options = ("0:3", "0:3", "0:3", "3:5", "3:5", "3:5"), ("--device", str(device))
        peers = swarm.serve(models("llama"), *spans, options=options, lie="lacks memory")
        both = Both(models("llama"), swarm)
        for kind in ("greedy", "beams"):
            ours, theirs = (Talk(kind, 1, 12).say(model, None) for model in (both.remote(), both.local()))
            assert torch.equal(ours, theirs)
        losses, expected = (train(with_lora(model), 1, 4) for model in (both.remote(), both.local()))
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
        assert sum(peer.stderr.read_text().count("was refused: CUDA out of memory") for peer in peers) > 1
