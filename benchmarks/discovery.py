"""How long it takes until members of a private swarm find each other on a LAN, with nothing configured.

python -m benchmarks.discovery --rounds 20     (Linux, as root: hosts are network namespaces)

Every round is a new member on a host of its own, which shares a bridge (IPv4 and IPv6) with a member that is up. Median
and worst, in seconds.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bootstrap.discovery.discovery import LOOK
from bootstrap.member import Member, MemberOptions
from bootstrap.membership.folder import SwarmFolder
from tests.tools.machines import machines
from tests.tools.namespaces import Host, Networks, open_networks, why_not
from tests.tools.seekers import seekers
from tests.tools.swarm import ForkServer
from tests.tools.swarms import found, let_in


def hear(networks: Networks, rounds: int) -> Iterator[float]:
    """Until a member that starts has heard where another one is."""
    lan = networks.lan()
    with seekers(networks.host("up", lan)):
        time.sleep(2)  # until it has said so
        for number in range(rounds):
            host, begin = networks.host(f"new{number}", lan), time.perf_counter()
            with seekers(host, announce=False) as [seeker]:
                seeker.wait_for("up")
                yield time.perf_counter() - begin


def plug_in(networks: Networks, rounds: int) -> Iterator[float]:
    """Until a member that is up has heard of another one, from when its cable is put in."""
    lan = networks.lan()
    with seekers(networks.host("up", lan)):
        for number in range(rounds):
            host = networks.host(f"new{number}")
            with seekers(host, announce=False) as [seeker]:
                time.sleep(1 + LOOK * number / rounds)
                host.connect(lan)
                begin = time.perf_counter()
                seeker.wait_for("up")
                yield time.perf_counter() - begin


def join(host: Host, swarm: SwarmFolder, *addresses: str) -> float:
    """Until a client is a member, p2pd's start included."""

    async def main() -> float:
        begin = time.perf_counter()
        member = await Member.join(MemberOptions(addresses, client_mode=True, swarm=swarm))
        taken = time.perf_counter() - begin
        await member.shutdown()
        return taken

    return host.space.inside(lambda: asyncio.run(main()))


def measure_joins(networks: Networks, rounds: int) -> dict[str, list[float]]:
    """A client that knows nobody, and one that is told an address, in turn."""
    lan, told, knowing_nobody = networks.lan(), list[float](), list[float]()
    server = ForkServer()
    with tempfile.TemporaryDirectory() as folder, machines(server, Path(folder), networks.host("up", lan)) as [machine]:
        admin = found(machine.home)
        node = machine.start("bootstrap")
        node.wait_ready()
        time.sleep(2)
        for number in range(rounds):
            host, swarm = networks.host(f"new{number}", lan), let_in(admin)
            told.append(join(host, swarm, node.address))
            (swarm.path / "known.json").unlink()
            knowing_nobody.append(join(host, swarm))
    server.close()
    return {
        "a client that is told an address has joined": told,
        "a client that knows no address has joined": knowing_nobody,
    }


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    if reason := why_not():
        raise SystemExit(reason)
    kinds: dict[str, Callable[[Networks, int], Iterator[float]]] = {
        "a member that starts has heard of another": hear,
        "... from when its cable is put in": plug_in,
    }
    figures = {}
    for name, kind in kinds.items():
        with open_networks() as networks:
            figures[name] = list(kind(networks, rounds))
    with open_networks() as networks:
        figures |= measure_joins(networks, rounds)
    print("| until | median | worst |\n|---|---|---|")
    for name, taken in figures.items():
        print(f"| {name} | {statistics.median(taken):.2f} | {max(taken):.2f} |")


if __name__ == "__main__":
    main()
