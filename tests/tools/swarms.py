"""Private swarms for tests: several machines' folders side by side, made without a network."""

import itertools
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from unittest.mock import patch

from bootstrap.addresses import split_peer_address
from bootstrap.member import Member
from bootstrap.membership.folder import SwarmFolder
from bootstrap.membership.own import OwnMembership
from protocol.membership.certificate import LIFETIME, Role, Signer, SigningKey
from protocol.membership.refusals import Refusal
from protocol.name import HOME_VARIABLE
from tests.tools.members import member

_NUMBERS = itertools.count()


@contextmanager
def home(folder: Path) -> Iterator[None]:
    """Within the block this process is on the machine whose home is `folder`."""
    with patch.dict(os.environ, {HOME_VARIABLE: str(folder)}):
        yield


def found(folder: Path, name: str = "lab") -> SwarmFolder:
    """A new swarm, on a machine whose home is `folder`."""
    with home(folder):
        return SwarmFolder.create(name, "founder")


def let_in(
    admin: SwarmFolder,
    folder: Path | None = None,
    role: Role = Role.USE,
    name: str = "",
    lifetime: int = LIFETIME,
    ago: int = 0,
    by: Signer | None = None,
) -> SwarmFolder:
    """A member's folder, on a machine whose home is `folder` (or any), let in by `admin` `ago` seconds before now.

    `by`: who signs instead of the admin.
    """
    key, name = SigningKey.generate(), name or f"member{next(_NUMBERS)}"
    signed = (by or admin.signer()).certify(key.public, role, name, int(time.time()) - ago, lifetime)
    OwnMembership(admin, "").learn([signed])
    with home(folder or Path(tempfile.mkdtemp(dir=admin.path.parents[2]))):
        return SwarmFolder.join(
            admin.name, admin.root, admin.secret_bytes, key, signed, OwnMembership(admin, "").roster.to_bytes()
        )


def revoke(admin: SwarmFolder, member: SwarmFolder) -> None:
    """Put a member out, as far as the admin's machine knows."""
    OwnMembership(admin, "").put_out(member.certificate())


class Machines:
    """What the machines of two private swarms, and one that is in none, know."""

    def __init__(self, root: Path):
        self.root = root
        self.founder, self.other = found(root / "founder"), found(root / "other")
        self.none: SwarmFolder | None = None
        self.server, self.user = (
            let_in(self.founder, root / r.name, r, r.name.lower()) for r in (Role.SERVE, Role.USE)
        )


WRONG: dict[str, Refusal] = {
    "expired": Refusal.EXPIRED,
    "revoked": Refusal.REVOKED,
    "of another process": Refusal.OTHER_PROCESS,
    "of another root": Refusal.OTHER_SWARM,
    "of a revoked admin": Refusal.ISSUER_REVOKED,
}


def wrong(machines: Machines, what: str) -> SwarmFolder:
    """A folder with the swarm's secret, and a certificate that is not to let in."""
    if what == "expired":
        return let_in(machines.founder, lifetime=60, ago=120)
    if what == "of a revoked admin":
        admin = let_in(machines.founder, role=Role.ADMIN)
        folder = let_in(admin)
        revoke(machines.founder, admin)
        return folder
    folder = let_in(machines.founder)
    if what == "revoked":
        revoke(machines.founder, folder)
    return folder


@asynccontextmanager
async def intruder(machines: Machines, what: str, *initial_peers: str) -> AsyncIterator[Member]:
    """A member that does not know, or care, that it is to be refused."""
    with patch.object(OwnMembership, "check_own", lambda self, role: None):
        async with member(swarm=wrong(machines, what), direct_port=0) as made:
            ours = made.membership
            assert ours is not None
            if what == "of another process":
                ours._process = OwnMembership(machines.user, "other").certificate()
            if what == "of another root":
                ours._process = OwnMembership(machines.other, made.peer_id).certificate()
            for address in initial_peers:
                peer_id, place = split_peer_address(address)
                await made._p2p.dial(peer_id, [place])
            yield made
