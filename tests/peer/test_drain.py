"""Peers that are told to leave: sessions move, running work ends, nothing is lost; a rolling update under load."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LogitsProcessorList

from client.swarm.retries import Retries
from tests.tools.arena import AtToken, assert_close, batch, step, with_adapter
from tests.tools.swarm import ForkServer, Peer, Swarm, new_swarm


@pytest.fixture(scope="module")
def pairs(fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[tuple[Path, Swarm]]:
    """A bootstrap node, and blocks 0:2 and 2:5 on two peers each."""
    with new_swarm(fork_server) as swarm:
        swarm.launch("bootstrap", "--host", "127.0.0.1").wait_ready()
        swarm.serve(models("llama"), "0:2", "2:5", "0:2", "2:5")
        yield models("llama"), swarm


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What any client of this process met with: a peer that leaves properly fails nobody."""
    met: list[str] = []
    failed = Retries.failed

    def note(self: Retries, peer: Any, error: Any) -> None:
        met.append(f"{type(error).__name__}: {error}")
        failed(self, peer, error)

    monkeypatch.setattr(Retries, "failed", note)
    return met


def leaving_at(peer: Peer, token: int) -> AtToken:
    return AtToken(token, lambda: peer.send(signal.SIGTERM))


def wait_gone(peer: Peer, within: float) -> None:
    end = time.monotonic() + within
    while peer.is_alive():
        assert time.monotonic() < end, peer.stderr.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["greedy", "beams"])
def test_sessions_move(how: str, pairs: tuple[Path, Swarm], failures: list[str], models: Any) -> None:
    """In the middle of a generation; the peer has gone before the generation ends."""
    path, swarm = pairs
    model = swarm.connect(path)
    victim = next(peer for peer in swarm.peers if peer.peer_id == model.swarm.route()[1].peer.peer_id)
    options = batch() | {"max_new_tokens": 40} | ({"num_beams": 3} if how == "beams" else {})
    leaver = leaving_at(victim, 5)
    waiter = AtToken(30, lambda: wait_gone(victim, 10))
    tokens = model.generate(**options, logits_processor=LogitsProcessorList([leaver, waiter]))
    local: Any = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    assert torch.equal(tokens, local.generate(**options))
    assert waiter.done
    assert leaver.stall < 5
    assert not failures
    assert "error" not in victim.stderr.read_text()
    swarm.serve(path, "2:5")


def test_the_only_holder_serves_until_its_time_is_up(swarm: Swarm, models: Callable[[str], Path]) -> None:
    """Nobody to move to: it stays as long as it may, and a successor that comes in time takes over."""
    path = models("llama")
    swarm.launch("bootstrap", "--host", "127.0.0.1").wait_ready()
    first = swarm.serve(path, "0:5", options=("--drain-timeout", "60"))[0]
    model = swarm.connect(path)

    def leave_and_be_followed() -> None:
        first.send(signal.SIGTERM)
        time.sleep(0.2)
        swarm.serve(path, "0:5")

    leaver = AtToken(5, leave_and_be_followed)
    options = batch() | {"max_new_tokens": 200}
    tokens = model.generate(**options, logits_processor=LogitsProcessorList([leaver]))
    local: Any = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    assert torch.equal(tokens, local.generate(**options))
    wait_gone(first, 10)


def test_idle_sessions_hold_nobody_up(pairs: tuple[Path, Swarm]) -> None:
    """A user who thinks about the next word does not keep a peer from leaving, and loses nothing by its leaving."""
    path, swarm = pairs
    model = swarm.connect(path)
    local: Any = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    victim = next(peer for peer in swarm.peers if peer.peer_id == model.swarm.route()[1].peer.peer_id)
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    said = []
    for each in (model, local):
        cache = transformers.DynamicCache(config=each.config)
        first = each.generate(torch.arange(3, 12)[None], past_key_values=cache, **options)
        if each is model:
            assert victim.stop(timeout=8) < 8
        said.append(each.generate(torch.cat([first, first[:, :2]], 1), past_key_values=cache, **options))
    assert torch.equal(*said)
    swarm.serve(path, "2:5")


def test_told_twice_it_leaves_at_once(pairs: tuple[Path, Swarm]) -> None:
    path, swarm = pairs
    model = swarm.connect(path)
    victim = next(peer for peer in swarm.peers if peer.peer_id == model.swarm.route()[1].peer.peer_id)
    cache = transformers.DynamicCache(config=model.config)
    model.generate(torch.arange(3, 12)[None], past_key_values=cache, max_new_tokens=2)
    victim.send(signal.SIGTERM)
    time.sleep(0.2)
    assert victim.is_alive()
    assert victim.stop() < 1
    swarm.serve(path, "2:5")


def test_a_rolling_update(pairs: tuple[Path, Swarm]) -> None:
    """Every peer is told to leave and followed by another, one by one, while clients generate and train."""
    path, swarm = pairs
    local: Any = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    generating, training = swarm.connect(path), with_adapter(swarm.connect(path, micro_batch_tokens=14))
    expected = local.generate(**batch())
    expected_step = step(with_adapter(transformers.AutoModelForCausalLM.from_pretrained(path)))
    done, problems, count = threading.Event(), list[BaseException](), [0, 0]

    def generate() -> None:
        assert torch.equal(generating.generate(**batch()), expected)
        count[0] += 1

    def train() -> None:
        assert_close(step(training), expected_step)
        count[1] += 1

    def insist(work: Callable[[], None]) -> None:
        try:
            while not done.is_set():
                work()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=insist, args=(work,)) for work in (generate, train)]
    for thread in threads:
        thread.start()
    for old in [peer for peer in swarm.peers[1:] if peer.is_alive()]:
        swarm.serve(path, f"{old.blocks.start}:{old.blocks.stop}")
        before = tuple(count)
        old.stop(timeout=20)
        while not problems and any(now == then for now, then in zip(count, before, strict=True)):
            time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert not problems
