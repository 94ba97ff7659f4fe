"""`peer serve --device A,B --restart`: a real peer on each; the CPU stands for both."""

import re
import signal
import time
from pathlib import Path

import psutil

from bootstrap.member import Member, MemberOptions
from client.swarm.loop import LOOP
from protocol.model.checkpoint import open_checkpoint
from tests.tools.swarm import Peer, Swarm

READY = re.compile(r"^ready address=(\S+) blocks=(\S+)", re.M)


def wait_for_ready(peer: Peer, count: int) -> list[tuple[str, str]]:
    """Addresses and blocks of the peers that have been ready."""
    deadline = time.monotonic() + 120
    while len(found := READY.findall(peer.stdout.read_text())) < count:
        assert peer.is_alive(), peer.stderr.read_text()
        assert time.monotonic() < deadline, peer.stderr.read_text()
        time.sleep(0.05)
    return found


def spans(address: str, model: Path) -> set[tuple[int, int]]:
    """The spans announced in the swarm of a member."""
    member = LOOP.run(Member.join(MemberOptions((address,), client_mode=True)))
    peers = LOOP.run(member.directory.peers(open_checkpoint(str(model)).model_id.config_hash))
    LOOP.run(member.shutdown())
    return {(peer.start, peer.end) for peer in peers}


def test_a_peer_for_each_device_started_again_when_its_p2pd_dies(swarm: Swarm, llama: Path) -> None:
    options = ("--host", "127.0.0.1", "--threads", "1", "--device", "cpu,cpu", "--num-blocks", "3", "--restart")
    both = swarm.launch("serve", str(llama), *options)
    both.wait_ready()
    (_, first), (address, second) = wait_for_ready(both, 2)
    assert (first, second) == ("0:3", "2:5"), "placed one after the other: the second serves what lacks"
    assert spans(address, llama) == {(0, 3), (2, 5)}
    founder, _ = psutil.Process(both.pid).children()
    (p2pd,) = founder.children()
    p2pd.kill()
    assert wait_for_ready(both, 3)[2][1] == "0:3", "it joins again by the second, and serves what lacks"
    assert spans(address, llama) == {(0, 3), (2, 5)}
    log = both.stderr.read_text()
    assert "cpu/0: error: The p2pd process died" in log
    assert "the peer on cpu/0 ended with exit code 1; it is started again in 2 s" in log
    assert re.search(r"^cpu/1: INFO .*memory: ", log, re.M), "each has its part of the memory"
    processes = psutil.Process(both.pid).children(recursive=True)
    both.stop(signal.SIGINT)
    assert both.stdout.with_suffix(".code").read_text() == "0", both.stderr.read_text()
    assert psutil.wait_procs(processes, 5)[1] == []
