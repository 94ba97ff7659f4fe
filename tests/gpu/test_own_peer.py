"""A whole peer on the GPU, within this process: who asks the device for what.

Its event loop leaves the device to the compute thread: it would wait for all that has been queued there.
"""

import asyncio
import copy
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from client import AutoDistributedModelForCausalLM
from peer.compute.scheduler import Priority
from peer.server import Server
from peer.span.span import Inputs, Mode
from peer.training.call import TrainingCall
from tests.tools.methods import METHODS, adapted, train
from tests.tools.own_peer import LOOP_THREAD, OwnPeer, own_peer
from tests.tools.parity import padded_batch
from tests.tools.spans import states


@pytest.fixture(scope="module")
def peer(models: Callable[[str], Path], device: torch.device) -> Iterator[OwnPeer]:
    with own_peer(models("llama"), device=str(device), cache_tokens=2048, max_length=512) as made:
        yield made


@pytest.fixture
def model(peer: OwnPeer, models: Callable[[str], Path]) -> Any:
    return AutoDistributedModelForCausalLM.from_pretrained(str(models("llama")), initial_peers=[peer.address])


@pytest.fixture
def on_the_loop(pretended: Any) -> Counter[str]:
    """What the peer's event loop asks of the device, while a test runs."""
    seen = Counter[str]()

    def note(name: str) -> None:
        if threading.current_thread().name == LOOP_THREAD:
            seen[name] += 1

    pretended.on_operation(note)
    pretended.on_wait(note)
    return seen


def test_generation(on_the_loop: Counter[str], model: Any, pretended: Any) -> None:
    """Beams reorder the cache at every step; a copied cache forks the session."""
    model.generate(**padded_batch(), max_new_tokens=4, num_beams=2, pad_token_id=0)
    with torch.no_grad():
        cache = model(**padded_batch(), use_cache=True).past_key_values
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=copy.deepcopy(cache))
    assert pretended.operations()["copy to the device"] > 0
    assert not on_the_loop


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "PiSSA", "prefix tuning"])
def test_training(on_the_loop: Counter[str], model: Any, pretended: Any, method: str) -> None:
    """What adapters' initialisation needs of base weights is computed by the peer, too: norms, factors."""
    train(adapted(model, METHODS[method]("llama", "CAUSAL_LM")), "CAUSAL_LM", method, steps=1)
    assert pretended.operations()["copy to the device"] > 0
    assert not on_the_loop


@torch.no_grad()
def test_a_mask_without_padding_is_not_looked_at(model: Any, pretended: Any) -> None:
    """`generate` drops it, a loop of one's own does not."""
    ids, mask = padded_batch()["input_ids"], torch.ones(2, 21, dtype=torch.long)

    def two_steps(*masks: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, int]]:
        pretended.reset()
        cache = model(ids, attention_mask=masks[0], use_cache=True).past_key_values
        logits: torch.Tensor = model(ids[:, -1:], attention_mask=masks[1], past_key_values=cache).logits
        return logits, pretended.waits()

    expected, _ = two_steps(None, None)
    logits, waits = two_steps(mask[:, :20], mask)
    assert torch.equal(logits, expected)
    assert waits == {"stream.synchronize": 2}


def test_calls_that_wait_hold_host_memory_only(model: Any, peer: OwnPeer, pretended: Any) -> None:
    """However many clients queue for a slow device, its memory is that of the call that runs."""
    scheduler, begun, go_on = peer.server._scheduler, threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        go_on.wait(10)

    async def submit() -> None:
        await scheduler.submit(Priority.STEP, block)

    asyncio.run_coroutine_threadsafe(submit(), peer.loop)
    begun.wait(10)
    before = pretended.bytes_now()
    caller = threading.Thread(target=lambda: model(**padded_batch(), use_cache=False))
    caller.start()
    wait_until(lambda: any("1 CALL" in line for line in scheduler.describe()))
    assert pretended.bytes_now() == before
    go_on.set()
    caller.join()


def test_training_is_joined_where_that_is_asked_for(
    peer: OwnPeer, models: Callable[[str], Path], device: torch.device
) -> None:
    def is_joined(server: Server) -> bool:
        call = TrainingCall(Inputs(states(1, 3, 0)), Mode(server.span.blocks), None, {})
        return server.service._training.runner.forward(call, "ann", keep=False).group is not None

    assert not is_joined(peer.server)
    with own_peer(models("llama"), device=str(device), cache_tokens=64, join_training=True) as other:
        assert is_joined(other.server)


def wait_until(holds: Callable[[], bool]) -> None:
    """Within ten seconds."""
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
