"""SIGUSR1 has a running command show what it does, and changes nothing about it."""

import asyncio
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peer import server
from peer.start.memory import Budget
from tests.tools.spans import WIDTH
from tests.tools.swarm import Peer, Swarm
from tests.tools.wire import MAX_LENGTH, OPEN, Wire, step

ASK = signal.SIGUSR1


def ask(peer: Peer) -> str:
    """What a peer says of itself: its state comes last."""
    before = peer.stderr.read_text()
    peer.send(ASK)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        said = peer.stderr.read_text().removeprefix(before)
        if re.search(r"other members known", said):
            return said
        time.sleep(0.02)
    raise AssertionError(f"the peer did not say what it does: {said}")


def test_a_peer_says_what_it_does(llama_swarm: tuple[Path, Swarm]) -> None:
    path, swarm = llama_swarm
    peer = swarm.peers[1]
    said = ask(peer)
    assert said.count("(most recent call first):") > 1  # more threads than one
    assert re.search(r"^0x[0-9a-f]{16} compute$", said, re.M)
    assert re.search(r"^Task-\d+:\n  File .*\n.*\n(.*\n)*?.* in run\n +await asyncio\.wait\(waiting", said, re.M)
    assert "online: blocks 2:3 of llama, version " in said
    assert "0 sessions, 0 requests being answered" in said
    assert "work of 0 clients waits for the compute thread" in said
    assert f"member {peer.peer_id}, p2pd is process " in said
    assert peer.address in said

    model = swarm.connect(path)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        said = ask(peer)
        assert re.search(r"^[1-9]\d* steps in [1-9]\d* passes since the start$", said, re.M)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)


def test_a_peer_says_what_is_used_of_its_memory(opened_wire: Wire) -> None:
    channel = opened_wire.run(opened_wire.greeted())
    for message in (OPEN, step(1, hidden=torch.zeros(2, MAX_LENGTH, WIDTH))):
        opened_wire.run(channel.call(message))
    said = ask(opened_wire.peer)
    channel.close()
    (line,) = re.findall(r"^memory used: (.*)$", said, re.M)
    assert re.fullmatch(r"KV caches 12.5% of .* GB, kept activations [\d.]+% of .* GB, adapters 0.0% of .* GB", line)


def test_the_log_tells_what_is_used_when_that_has_changed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    budget, free = Budget.of(10**9, 50_000, 1000, 8192), [1000, 1000, 750, 750, 750, 500]
    peer: Any = SimpleNamespace(shares=lambda: budget.shares(free.pop(0), 0, 0))
    monkeypatch.setattr(server, "TELL_PERIOD", 0.0)
    with caplog.at_level("INFO", "peer"), pytest.raises(IndexError):
        asyncio.run(server.Server._tell_of_memory(peer))
    assert [line.partition(" of ")[0] for line in caplog.messages] == [
        "memory used: KV caches 25.0%", "memory used: KV caches 50.0%",
    ]  # fmt: skip


def test_a_bootstrap_node_says_what_it_does(swarm: Swarm) -> None:
    node = swarm.launch("bootstrap", "--host", "127.0.0.1")
    node.wait_ready()
    said = ask(node)
    assert "(most recent call first):" in said
    assert f"member {node.peer_id}" in said
    assert "0 other members known" in said
    assert node.is_alive()


def test_stacks_are_shown_where_the_event_loop_hangs() -> None:
    code = """
import asyncio, time
from protocol.machine.inspection import describe_on_signal, show_stacks_on_signal

def hang():
    print("hangs", flush=True)
    time.sleep(60)

async def main():
    describe_on_signal(lambda: ["never said"])
    hang()

show_stacks_on_signal()
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(ASK)
        said = [process.stderr.readline() for _ in range(2)]
        process.kill()
    assert said[0].endswith("(most recent call first):\n")
    assert said[1].endswith("in hang\n")
