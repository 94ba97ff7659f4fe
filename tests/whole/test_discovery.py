"""Members of a private swarm find each other on a network with nothing configured. Machines are network namespaces."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hivemind.utils.multiaddr import Multiaddr

from bootstrap.addresses import split_peer_address
from bootstrap.membership.discovery import Discovery
from bootstrap.membership.folder import SwarmFolder
from protocol.membership.certificate import Role
from protocol.membership.secret import SwarmSecret
from tests.tools.network import Network, new_network, recorded, why_not
from tests.tools.swarm import ForkServer, Peer
from tests.tools.swarms import found, let_in

PEER = "QmZLpNtJqNU3utELa92YAA5urQkAyqcg1GjRDbEqbZWBhP"
PATIENCE = 15.0
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


class Lan:
    """Machines on one network, each of which runs commands of its own."""

    def __init__(self, server: ForkServer, network: Network, root: Path):
        self._server, self.network, self.root = server, network, root
        self.running: list[Peer] = []

    def bootstrap(self, machine: str, folder: SwarmFolder, *options: str) -> Peer:
        """`peer bootstrap` on a machine."""
        stem = Path(tempfile.mkdtemp(dir=self.root))
        peer = Peer(0, stem / "out", stem / "err")
        argv = ["bootstrap", *options]
        peer.pid = self._server.start(argv, peer.stdout, peer.stderr, home=folder.path.parents[1], network=machine)
        self.running.append(peer)
        peer.wait_ready()
        return peer

    def members(self, machine: str, folder: SwarmFolder) -> tuple[set[str], str]:
        """Who is up, as `peer members` on a machine has it; and what it says on stderr."""
        stem = Path(tempfile.mkdtemp(dir=self.root))
        peer = Peer(0, stem / "out", stem / "err")
        argv = ["members", "--json"]
        peer.pid = self._server.start(argv, peer.stdout, peer.stderr, home=folder.path.parents[1], network=machine)
        deadline = time.monotonic() + 30
        while peer.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        rows = json.loads(peer.stdout.read_text())
        return {row["name"] for row in rows if row["seen"] and not row["this"]}, peer.stderr.read_text()

    def close(self) -> None:
        for peer in self.running:
            peer.kill()


@pytest.fixture
def lan(fork_server: ForkServer, tmp_path: Path) -> Iterator[Lan]:
    with new_network() as network:
        made = Lan(fork_server, network, tmp_path)
        try:
            yield made
            assert all("Traceback" not in peer.stderr.read_text() for peer in made.running)
        finally:
            made.close()


@pytest.fixture
def folders(tmp_path: Path) -> list[SwarmFolder]:
    """Three machines' folders of one swarm, none of which knows where another is."""
    founder = found(tmp_path / "machines" / "a")
    return [founder, *(let_in(founder, role=Role.SERVE, name=name) for name in ("b", "c"))]


def has_met(folder: SwarmFolder, other: Peer, patience: float = PATIENCE) -> bool:
    """Whether the process of a machine hears of another one."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if other.peer_id in folder.known:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    "addresses",
    [("192.0.2.{}/24",), ("fd00:2::{}/64",)],
    ids=["IPv4 only", "IPv6 only"],
)
def test_members_find_each_other(lan: Lan, folders: list[SwarmFolder], addresses: tuple[str, ...]) -> None:
    """Beside a bridge that leads nowhere, and an interface that is dead; and so does a client."""
    machines = [lan.network.machine(*(address.format(number) for address in addresses)) for number in range(1, 4)]
    for machine in machines[:2]:
        lan.network.decoy(machine, "172.17.0.1/16")
    first = lan.bootstrap(machines[0], folders[0])
    lan.bootstrap(machines[1], folders[1])
    assert has_met(folders[1], first)
    assert lan.members(machines[2], folders[2])[0] == {"founder", "b"}


def test_an_interface_that_appears_later(lan: Lan, folders: list[SwarmFolder]) -> None:
    one, two = lan.network.machine("192.0.2.1/24"), lan.network.machine()
    lan.network.decoy(two, "172.17.0.1/16")
    first = lan.bootstrap(one, folders[0])
    lan.bootstrap(two, folders[1])
    assert not has_met(folders[1], first, patience=1)
    lan.network.plug_in(two, "192.0.2.2/24")
    assert has_met(folders[1], first, patience=40)


def test_swarms_do_not_see_each_other_and_discovery_can_be_off(
    lan: Lan, folders: list[SwarmFolder], tmp_path: Path
) -> None:
    other = found(tmp_path / "machines" / "other")
    one, two, three = (lan.network.machine(f"192.0.2.{number}/24") for number in range(1, 4))
    quiet = lan.bootstrap(one, folders[0], "--no-discovery")
    lan.bootstrap(two, other)
    seen, said = lan.members(three, folders[1])
    assert seen == set()
    assert "No member of the swarm was found on this network, and none is known from before" in said
    quiet.kill()
    lan.bootstrap(one, folders[0])
    assert lan.members(three, folders[1])[0] == {"founder"}
    assert set(other.known) == {lan.running[1].peer_id}


def test_nobody_outside_of_the_network_is_contacted(lan: Lan, folders: list[SwarmFolder]) -> None:
    """Whatever members send to where they were not told to goes to the gateway, which writes it down."""
    machines = [lan.network.machine(f"192.0.2.{number}/24") for number in range(1, 4)]
    gateway = lan.network.machine("192.0.2.254/24", "198.51.100.1/24")
    for machine in machines:
        lan.network.route_to(machine, "192.0.2.254")
    with recorded(gateway) as heard:
        first = lan.bootstrap(machines[0], folders[0])
        lan.bootstrap(machines[1], folders[1])
        assert has_met(folders[1], first)
        assert lan.members(machines[2], folders[2])[0] == {"founder", "b"}
        named = f"/ip4/203.0.113.9/tcp/1/p2p/{PEER}"
        lan.bootstrap(machines[2], folders[2], "--swarm", "lab", "--initial-peers", named)
        time.sleep(2)
    assert set(heard) == {"203.0.113.9"}  # which the user named: so it would have been seen


def test_what_is_broadcast_tells_nothing() -> None:
    address = f"/ip4/127.0.0.1/tcp/1234/p2p/{PEER}"
    ours, same, theirs = (
        Discovery(SwarmSecret(bytes([number]) * 32), peer_id, lambda addresses: None)
        for number, peer_id in ((1, PEER), (1, "QmOther"), (2, "QmOther"))
    )
    said, again = ours._describe([address]), ours._describe([address])
    assert said is not None
    assert again is not None
    assert said.name != again.name
    assert said.properties[b"i"] != again.properties[b"i"]
    assert same.read(said) == [address]
    assert theirs.read(said) == []
    assert ours.read(said) == []
    away = ours._describe([f"/ip4/198.51.100.7/tcp/1234/p2p/{PEER}"])
    assert same.read(away) == []  # not on a network of this machine's
    assert ours._describe([f"/dns4/a.org/tcp/1/p2p/{PEER}"]) is None
    assert split_peer_address(address)[1] == Multiaddr("/ip4/127.0.0.1/tcp/1234")
