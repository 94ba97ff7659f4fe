"""How fast a private swarm puts a member out.

python -m benchmarks.membership --members 12 --rounds 10
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
from bootstrap.membership.own import OwnMembership
from protocol.errors import NotAMember
from protocol.membership.certificate import Role
from tests.tools.members import member
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


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        seconds = asyncio.run(measure_revoke(Path(root), given.members, given.rounds))
    print(f"median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s of {len(seconds)}")


if __name__ == "__main__":
    main()
