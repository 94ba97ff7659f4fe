"""How fast a private swarm puts a member out, and how fast members find each other on a network.

python -m benchmarks.membership revoke --members 12 --rounds 10
python -m benchmarks.membership discovery --rounds 20            (root, Linux: machines are network namespaces)
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from hivemind.proto import dht_pb2

from bootstrap.addresses import split_peer_address
from bootstrap.member import Member
from bootstrap.membership.folder import SwarmFolder
from bootstrap.membership.own import OwnMembership
from protocol.errors import NotAMember
from protocol.membership.certificate import Role
from tests.tools.members import member
from tests.tools.network import new_network
from tests.tools.swarm import ForkServer, Peer
from tests.tools.swarms import found, let_in


async def measure_revoke(root: Path, members: int, rounds: int) -> list[float]:
    """Seconds from `peer revoke`'s signature until the last of `members` refuses the one who is out."""
    founder, seconds = found(root / "founder"), list[float]()
    async with AsyncExitStack() as running:
        everyone = [await running.enter_async_context(member(swarm=founder))]
        for _ in range(members - 1):
            swarm = let_in(founder, role=Role.SERVE)
            everyone.append(await running.enter_async_context(member(*everyone[0].addresses, swarm=swarm)))
        for _ in range(rounds):
            leaver = let_in(founder)
            async with member(*everyone[0].addresses, swarm=leaver, client_mode=True) as out:
                for other in everyone:
                    peer_id, place = split_peer_address(other.addresses[0])
                    await out._p2p.dial(peer_id, [place])
                begin = time.perf_counter()
                ours = OwnMembership(founder, "")  # as the command does, on the first member's machine
                ours.learn([ours.signer().revoke(leaver.key.public, int(time.time()))])
                await asyncio.gather(*(_refused(out, other) for other in everyone))
                seconds.append(time.perf_counter() - begin)
    return seconds


async def _refused(caller: Member, other: Member) -> None:
    """Until `other` refuses a request of the directory."""
    stub = caller._node.protocol.get_stub(other._p2p.peer_id)
    while True:
        try:
            await stub.rpc_ping(dht_pb2.PingRequest(), timeout=3)
        except NotAMember:
            return
        await asyncio.sleep(0.02)


def measure_discovery(root: Path, rounds: int) -> list[float]:
    """Seconds that it takes a second member to meet the first, which it has never heard of: from its start, p2pd's
    included, until it has written the first one down."""
    server, seconds = ForkServer(), list[float]()
    for number in range(rounds):
        founder = found(root / str(number))
        other = let_in(founder)
        with new_network() as network:
            first = _bootstrap(server, network.machine("192.0.2.1/24"), founder)
            first.wait_ready()
            begin = time.perf_counter()
            second = _bootstrap(server, network.machine("192.0.2.2/24"), other)
            while first.peer_id not in other.known:
                time.sleep(0.01)
            seconds.append(time.perf_counter() - begin)
            for peer in (first, second):
                peer.kill()
    server.close()
    return seconds


def _bootstrap(server: ForkServer, machine: str, folder: SwarmFolder) -> Peer:
    stem = Path(tempfile.mkdtemp())
    peer = Peer(0, stem / "out", stem / "err")
    home = folder.path.parents[1]
    peer.pid = server.start(["bootstrap"], peer.stdout, peer.stderr, home=home, network=machine)
    return peer


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("revoke", "discovery"))
    parser.add_argument("--members", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        if given.what == "revoke":
            seconds = asyncio.run(measure_revoke(Path(root), given.members, given.rounds))
        else:
            seconds = measure_discovery(Path(root), given.rounds)
    print(f"{given.what}: median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s of {len(seconds)}")


if __name__ == "__main__":
    main()
