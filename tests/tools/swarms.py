"""Private swarms for tests: several machines' folders side by side, made without a network."""

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from bootstrap.membership.folder import SwarmFolder
from bootstrap.membership.own import OwnMembership
from protocol.membership.certificate import LIFETIME, Role, Signer, SigningKey
from protocol.name import HOME_VARIABLE

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
    ours = OwnMembership(admin, "")
    ours.learn([ours.signer().revoke(member.key.public, int(time.time()))])
