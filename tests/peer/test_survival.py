"""What a peer survives: a call that does not fit its memory, and clients that vanish."""

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from bootstrap.member import Member, MemberOptions
from client.swarm.loop import LOOP
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import OutOfMemory, PeerFailed, PeerFull
from protocol.tensors import Limits
from tests.tools.spans import WIDTH
from tests.tools.swarm import ForkServer
from tests.tools.wire import HIDDEN, MAX_LENGTH, MIB, OPEN, Wire, context, forward, open_wire, step

BACKWARD = Message(pb.Backward(context=context(training=True)), {"hidden_states": HIDDEN, "grad": HIDDEN})


@pytest.fixture(scope="module")
def small(fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[Wire]:
    """A peer whose caches hold two sessions of full length."""
    with open_wire(fork_server, models("llama"), "--cache-tokens", str(2 * MAX_LENGTH)) as wire:
        yield wire


def test_a_call_that_does_not_fit(small: Wire) -> None:
    """The machine runs out of memory in the middle of it; the call fails, the peer does not."""
    peer = psutil.Process(small.peer.pid)
    before = peer.rlimit(resource.RLIMIT_AS)
    peer.rlimit(resource.RLIMIT_AS, (peer.memory_info().vms + 160 * MIB, before[1]))
    try:
        with pytest.raises(OutOfMemory, match="did not fit this peer's memory; send fewer tokens at once"):
            small.ask(forward({"hidden_states": torch.zeros(4000, MAX_LENGTH, WIDTH)}, keep=True))
    finally:
        peer.rlimit(resource.RLIMIT_AS, before)
    with small.still_serves():
        pass


def test_a_client_that_vanishes_leaves_nothing(small: Wire) -> None:
    """Its p2pd is killed while a step of its session is being computed, as by a power cut."""

    async def fill(member: Member) -> None:
        channel = Channel(await member.transport.connect(small.peer.peer_id), Limits(), 10)
        await channel.call(Message(small.hello))
        await channel.call(OPEN)
        await channel.call(step(1, hidden=torch.zeros(2, MAX_LENGTH - 1, WIDTH)))
        await channel.send(step(2, hidden=torch.zeros(2, 1, WIDTH)))
        os.kill(member.daemon_process_id, signal.SIGKILL)

    member = LOOP.run(Member.join(MemberOptions((small.peer.address,), client_mode=True)))
    small.run(fill(member))
    end = time.monotonic() + 20  # before idle sessions give way
    while True:
        try:
            small.ask(OPEN, step(1, hidden=torch.zeros(2, MAX_LENGTH, WIDTH)))
            break
        except PeerFull:
            assert time.monotonic() < end
            time.sleep(0.1)
    LOOP.run(member.shutdown())


def test_a_device_that_refuses_a_call(fork_server: ForkServer, models: Callable[[str], Path], tmp_path: Path) -> None:
    """But computes on: a client cannot end a peer with what a kernel does not take. Another peer may compute it, also
    where the call is longer than the model's context, which by itself says that no peer can."""
    model = shutil.copytree(models("llama"), tmp_path / "short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": HIDDEN.shape[1] - 1}))
    with open_wire(fork_server, model, lie="device fails") as wire:
        for _ in range(2):
            with pytest.raises(PeerFailed, match="illegal memory access"):
                wire.ask(BACKWARD)
        assert wire.peer.is_alive()


def test_a_device_that_fails_for_good(fork_server: ForkServer, models: Callable[[str], Path]) -> None:
    """Not `PeerFailed` for ever while more and more clients are sent to it: it leaves the swarm, and says why."""
    with open_wire(fork_server, models("llama"), lie="device is lost") as wire:
        process, channel = psutil.Process(wire.peer.pid), wire.run(wire.greeted())
        with pytest.raises(PeerFailed, match="illegal memory access"):
            wire.run(channel.call(BACKWARD))
        psutil.wait_procs([process], 20)
        assert wire.peer.stdout.with_suffix(".code").read_text() == "1"
        said = wire.peer.stderr.read_text()
        sentence = "error: The device cpu has failed for good, and the log says how, so this peer can compute nothing"
        assert f"\n{sentence} any more; start the peer again." in said
        assert "could not be withdrawn" not in said


def test_a_full_disk(fork_server: ForkServer, models: Callable[[str], Path]) -> None:
    """No file takes another byte, the log included: it serves on, and ends when it must though it cannot say why."""
    with open_wire(fork_server, models("llama")) as wire:
        process = psutil.Process(wire.peer.pid)
        written = os.stat(wire.peer.stderr).st_size
        process.rlimit(resource.RLIMIT_FSIZE, (0, 0))
        with wire.still_serves():
            pass
        process.children()[0].kill()  # p2pd: it has much to say now
        process.wait(30)
        assert os.stat(wire.peer.stderr).st_size == written
