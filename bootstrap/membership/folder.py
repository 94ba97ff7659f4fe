"""What this machine knows of a private swarm: a folder whose files only their owner can read.

swarm.json      the root's public key, the swarm's secret, and a line to change: "discovery": false looks for nobody
member.key      this member's private key; root.key: the swarm's own, where it was created
certificate     this member's
roster          the members, revocations and invitations that are known
known.json      the processes that were seen of late: whose, when, at which addresses
port            where this machine listened last, so that others find it again after a restart
identity        the libp2p identity of the process that listens; others have one for their lifetime
"""

import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from protocol.errors import BadUsage
from protocol.machine.private_files import create_private, write_private
from protocol.membership.certificate import (
    ADMIN_LIFETIME,
    BadStatement,
    Certificate,
    Role,
    Signer,
    SigningKey,
    read_statement,
)
from protocol.membership.secret import SECRET_BYTES, SwarmSecret
from protocol.name import home_folder

OPEN = "open"
"""What --swarm is given to be in no private swarm, though one is known."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_MAX_KNOWN = 64
_MAX_FILE_BYTES = 4 * 2**20


class Known(BaseModel):
    """A process of a member, as it was seen last."""

    model_config = ConfigDict(frozen=True)

    member: str
    """The member's short name."""
    seen: float
    """Seconds since the epoch."""
    version: str = Field(max_length=40)
    addresses: tuple[str, ...] = ()
    """Full multiaddrs; none: it listens nowhere."""


_KNOWN = TypeAdapter(dict[str, Known])


class SwarmFolder:
    """The folder of one swarm. All methods that read or write raise `BadUsage` when a file cannot be used."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.name
        try:
            described = json.loads(self._read("swarm.json"))
            self.root = bytes.fromhex(described["root"])
            self.secret_bytes = bytes.fromhex(described["secret"])
            self.secret = SwarmSecret(self.secret_bytes)
            self.discovery = bool(described.get("discovery", True))
            """Whether to look for members on this machine's networks, and let oneself be found there."""
            self.key = SigningKey(bytes.fromhex(self._read("member.key").decode()))
        except (ValueError, TypeError, LookupError) as error:
            raise BadUsage(
                f"{path} is damaged; forget the swarm (`peer swarm forget {self.name}`) and join it again."
            ) from error

    @classmethod
    def create(cls, name: str, member_name: str) -> Self:
        """A new swarm, whose first admin this machine is. Raises `BadUsage`, also when one of that name is known."""
        root, key, now = SigningKey.generate(), SigningKey.generate(), int(time.time())
        certificate = Signer(root, None).certify(key.public, Role.ADMIN, member_name, now, ADMIN_LIFETIME)
        files = {"root.key": _key_file(root)}
        return cls._write(name, root.public, os.urandom(SECRET_BYTES), key, certificate, files)

    @classmethod
    def join(cls, name: str, root: bytes, secret: bytes, key: SigningKey, certificate: bytes, roster: bytes) -> Self:
        """A swarm that this machine has been let into. Raises `BadUsage` as `create`."""
        return cls._write(name, root, secret, key, certificate, {"roster": roster})

    @classmethod
    def _write(
        cls, name: str, root: bytes, secret: bytes, key: SigningKey, certificate: bytes, files: dict[str, bytes]
    ) -> Self:
        """All of it or nothing: written under another name and moved."""
        check_name(name)
        home = swarms_folder()
        described = {"root": root.hex(), "secret": secret.hex(), "discovery": True}
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=home, prefix=".new-"))
            try:
                for file, content in {
                    "swarm.json": json.dumps(described, indent=2).encode() + b"\n",
                    "member.key": _key_file(key),
                    "certificate": certificate,
                    **files,
                }.items():
                    create_private(part / file, content)
                os.rename(part, home / name)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            if (home / name).exists():
                raise BadUsage(
                    f"This machine knows a swarm called {name!r} already; choose another name, or forget that one "
                    f"(`peer swarm forget {name}`)."
                ) from error
            raise BadUsage(f"{home} cannot be written: {error.strerror or error}.") from error
        return cls(home / name)

    @property
    def identity_path(self) -> Path:
        """The identity file of the process that listens."""
        return self.path / "identity"

    @property
    def models(self) -> Path:
        """The folder for what is known of the swarm's models; made on demand."""
        folder = self.path / "models"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def signer(self) -> Signer:
        """This member. Its certificate may have expired, or been revoked."""
        return Signer(self.key, self.certificate())

    def certificate(self) -> Certificate:
        """This member's."""
        try:
            found = read_statement(self.root, self._read("certificate"))
        except BadStatement as error:
            raise BadUsage(f"{self.path}/certificate is damaged; join the swarm again with a new ticket.") from error
        if not isinstance(found, Certificate) or found.key != self.key.public:
            raise BadUsage(f"{self.path}/certificate is another member's; join the swarm again with a new ticket.")
        return found

    def save_certificate(self, certificate: Certificate) -> None:
        """Keep a newer certificate of this member."""
        self._save("certificate", certificate.signed)

    def read_roster(self) -> bytes:
        """What was written last; empty at first."""
        return self._read("roster") if (self.path / "roster").exists() else b""

    def save_roster(self, roster: bytes) -> None:
        """Only while `lock` is held, or what another process has learned would be lost."""
        self._save("roster", roster)

    def lock(self) -> FileLock:
        """Between processes that change the roster."""
        return FileLock(self.path / ".lock", mode=0o600)

    def version(self) -> object:
        """A value that changes when roster or certificate do."""
        return tuple(_version(self.path / file) for file in ("roster", "certificate"))

    @property
    def known(self) -> dict[str, Known]:
        """Peer ID -> what was seen of it, the latest first."""
        try:
            found = _KNOWN.validate_json(self._read("known.json"))
        except (BadUsage, ValidationError):
            return {}  # it only saves time
        return dict(sorted(found.items(), key=lambda item: -item[1].seen))

    def remember(self, seen: dict[str, Known]) -> None:
        """Add what was seen now."""
        with self.lock():
            both = sorted((self.known | seen).items(), key=lambda item: -item[1].seen)[:_MAX_KNOWN]
            self._save("known.json", _KNOWN.dump_json(dict(both), indent=1))

    def addresses(self, without: Iterable[str] = ()) -> tuple[str, ...]:
        """Where members were seen last, the latest first, not of the peers `without`."""
        skipped = set(without)
        return tuple(
            address for peer_id, known in self.known.items() if peer_id not in skipped for address in known.addresses
        )

    @property
    def port(self) -> int:
        """Where this machine listened last; 0: nowhere yet."""
        with suppress(BadUsage, ValueError):
            return int(self._read("port"))
        return 0

    def save_port(self, port: int) -> None:
        """Listen there the next time too."""
        self._save("port", str(port).encode())

    def recover(self, root_key: Path, member_name: str) -> "SwarmFolder":
        """This machine as a new member that the root key names an admin. Raises `BadUsage` for another swarm's key."""
        try:
            root = SigningKey(bytes.fromhex(root_key.read_text(encoding="ascii")))
        except OSError as error:
            raise BadUsage(f"{root_key} cannot be read: {error.strerror or error}.") from error
        except ValueError as error:
            raise BadUsage(
                f"{root_key} is no root key; expected the root.key that `peer swarm create` made."
            ) from error
        if root.public != self.root:
            raise BadUsage(f"{root_key} is the root key of another swarm than {self.name}.")
        key, now, roster = SigningKey.generate(), int(time.time()), self.read_roster()
        certificate = Signer(root, None).certify(key.public, Role.ADMIN, member_name, now, ADMIN_LIFETIME)
        kept = {name: self._read(name) for name in ("root.key", "known.json") if (self.path / name).exists()}
        self.forget()
        return self._write(self.name, self.root, self.secret_bytes, key, certificate, {"roster": roster, **kept})

    def forget(self) -> None:
        """Delete all of it, this member's key included: there is no way back but another invitation."""
        gone = self.path.with_name(f".gone-{self.name}-{os.getpid()}")
        try:
            os.rename(self.path, gone)
            shutil.rmtree(gone)
        except OSError as error:
            raise BadUsage(f"{self.path} cannot be deleted: {error.strerror or error}.") from error

    def _read(self, name: str) -> bytes:
        path = self.path / name
        try:
            with path.open("rb") as file:
                # An error, as a warning would be overlooked. A group may read it, where an administrator wants that.
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o007:
                    raise BadUsage(f"{path} can be read by every user of this machine; run `chmod 600 {path}`.")
                return file.read(_MAX_FILE_BYTES)
        except OSError as error:
            raise BadUsage(f"{path} cannot be read: {error.strerror or error}.") from error

    def _save(self, name: str, content: bytes) -> None:
        path = self.path / name
        try:
            write_private(path, content)
        except OSError as error:
            raise BadUsage(f"{path} cannot be written: {error.strerror or error}.") from error


def swarms_folder() -> Path:
    """Where the swarms' folders are."""
    return home_folder() / "swarms"


def check_name(name: str) -> None:
    """Raises `BadUsage` for what is no name of a swarm."""
    if not _NAME.fullmatch(name) or name == OPEN:
        raise BadUsage(
            f"{name!r} is no name for a swarm; expected up to 40 of a-z, 0-9, dot, dash and underscore, and not 'open'."
        )


def swarm_names() -> list[str]:
    """The swarms that this machine knows, sorted."""
    with suppress(OSError):
        return sorted(path.name for path in swarms_folder().iterdir() if _NAME.fullmatch(path.name))
    return []


def open_swarm(name: str) -> SwarmFolder:
    """The swarm that this machine calls `name`. Raises `BadUsage`."""
    names = swarm_names()
    if name not in names:
        known = f"it knows {', '.join(names)}" if names else "it knows none"
        raise BadUsage(
            f"This machine knows no swarm called {name!r} ({known}); `peer join TICKET` or `peer swarm create {name}` "
            "make one known."
        )
    return SwarmFolder(swarms_folder() / name)


def choose_swarm(name: str | None, has_addresses: bool, discovery: bool = True) -> SwarmFolder | None:
    """The swarm that is meant: the one named, or the only one; None: an open one.

    `has_addresses`: members' addresses were given, which lead to an open swarm if none is named. `discovery`: see
    `SwarmFolder`. Raises `BadUsage`, also when several are known and none is named.
    """
    names = swarm_names()
    if name == OPEN or (name is None and (has_addresses or not names)):
        return None
    if name is None and len(names) > 1:
        raise BadUsage(f"This machine knows the swarms {', '.join(names)}; choose one with --swarm.")
    folder = open_swarm(names[0] if name is None else name)
    folder.discovery &= discovery
    return folder


def _key_file(key: SigningKey) -> bytes:
    return key.private.hex().encode() + b"\n"


def _version(path: Path) -> Any:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size
