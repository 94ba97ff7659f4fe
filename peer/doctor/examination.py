"""The checks, in order, and how they are gone through."""

from collections.abc import AsyncIterator, Sequence

from peer.doctor import machine, network, peers, ports, standing
from peer.doctor.case import Case
from peer.doctor.check import Check, Findings, wrong
from protocol.errors import SwarmError, first_line

CHECKS: Sequence[Check] = (
    Check("clock", standing.clock),
    Check("disk", machine.disk),
    Check("memory", machine.memory),
    Check("device", machine.device),
    Check("p2pd", ports.p2pd),
    Check("ports", ports.listening),
    Check("swarm", standing.swarm),
    Check("dial back", network.dial_back),
    Check("multicast", network.multicast),
    Check("certificate", standing.certificate),
    Check("versions", standing.versions),
    Check("NAT", network.nat),
    Check("weights", peers.weights),
    Check("peers", peers.peers),
)


async def examine(case: Case) -> AsyncIterator[tuple[Check, Findings]]:
    """What each check finds, as it does."""
    for check in CHECKS:
        try:
            found = await check.run(case)
        except SwarmError as error:
            found = [wrong(str(error), "Do what the sentence says.")]
        except Exception as error:  # the checks that are left may say more
            kind = type(error).__name__
            found = [wrong(f"This check failed itself ({kind}: {first_line(error)}).", "Report it, with this line.")]
        yield check, found
