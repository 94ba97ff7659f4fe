"""The file with a swarm's keys: creating it, reading it (again when it changes), and the steps of a rotation."""

import base64
import binascii
import calendar
import logging
import re
import secrets
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bootstrap.private_files import create_private, replace_private
from protocol.errors import BadUsage
from protocol.handshake import MAX_KEYS
from protocol.name import NAME
from protocol.swarm_key import KEY_BYTES, SwarmKey

MAX_FILE_BYTES = 4096
_DATE = "%Y-%m-%dT%H:%M:%SZ"
_LINE = re.compile(rf"{NAME}-key-1 ([A-Za-z0-9_-]{{43}}) (\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """A line of the file."""

    text: str

    @classmethod
    def generate(cls, after: str = "") -> Self:
        """A new key, dated now, or one second later than the date `after` where that is in the future."""
        date = time.strftime(_DATE, time.gmtime())
        if date <= after:
            date = time.strftime(_DATE, time.gmtime(_seconds(after) + 1))
        secret = base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).decode().rstrip("=")
        return cls(f"{NAME}-key-1 {secret} {date}")

    @property
    def key(self) -> SwarmKey:
        """Raises `ValueError`."""
        match = _LINE.fullmatch(self.text)
        if match is None:
            raise ValueError
        _seconds(match[2])
        return SwarmKey(base64.b64decode(match[1] + "=", altchars="-_", validate=True))

    @property
    def date(self) -> str:
        """When the key was made; sorts by time."""
        return self.text.rpartition(" ")[2]


class KeyFile:
    """The present keys in a file, one per line: the first is used, all are accepted."""

    def __init__(self, path: Path):
        """Raises `BadUsage` for a file that cannot be read, is no key file, or can be read by everyone."""
        self._path = path.absolute()
        self._version = _version(self._path)
        self._keys = _keys(self._path)

    def current(self) -> Sequence[SwarmKey]:
        """The present keys. When the file has become unusable, that is logged, and the keys stay as they were."""
        version = _version(self._path)
        if version != self._version:
            self._version = version
            self._read_again()
        return self._keys

    def _read_again(self) -> None:
        try:
            self._keys = _keys(self._path)
        except BadUsage as error:
            _log.error("%s This process goes on with the keys that it has.", error)
        else:
            names = ", ".join(key.id.hex() for key in self._keys)
            _log.info("Read %s again: keys %s, the first of which is used.", self._path, names)


def create_key(path: Path) -> str:
    """Write a file with one new key; returns the key's ID. Raises `BadUsage`, also when the file exists."""
    entry = _Entry.generate()
    try:
        create_private(path, _content([entry]))
    except FileExistsError as error:
        raise BadUsage(f"{path} exists, and a key is never overwritten; name another file.") from error
    except OSError as error:
        raise BadUsage(f"{path} cannot be written: {error.strerror or error}.") from error
    return entry.key.id.hex()


def add_key(path: Path) -> str:
    """First step of a rotation: a new key, accepted but not yet used; returns its ID. Raises `BadUsage`."""
    entries = _read(path)
    if len(entries) > 1:
        raise BadUsage(
            f"{path} has {len(entries)} keys: a rotation is under way; finish with `peer key use` and `peer key drop`."
        )
    added = _Entry.generate(after=entries[0].date)
    _write(path, [*entries, added])
    return added.key.id.hex()


def use_newest_key(path: Path) -> str:
    """Second step: the newest key is used, the others are accepted; returns its ID. Raises `BadUsage`."""
    entries = sorted(_read(path), key=lambda entry: entry.date, reverse=True)
    if len(entries) == 1:
        raise BadUsage(f"{path} has one key only, which is used already; a rotation begins with `peer key add`.")
    _write(path, entries)
    return entries[0].key.id.hex()


def drop_old_keys(path: Path) -> str:
    """Last step: only the newest key is left; returns its ID. Raises `BadUsage` when it is not used yet."""
    entries = _read(path)
    if entries[0] != max(entries, key=lambda entry: entry.date):
        raise BadUsage(
            f"The newest key in {path} is not used yet; run `peer key use` first, and bring the file to all members."
        )
    _write(path, entries[:1])
    return entries[0].key.id.hex()


def _read(path: Path) -> list[_Entry]:
    """The file's entries. Raises `BadUsage`; no message shows what is in the file."""
    try:
        mode = path.stat().st_mode
        content = _head(path) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise BadUsage(f"The swarm key {path} cannot be read: {error.strerror or error}.") from error
    if not stat.S_ISREG(mode):
        raise BadUsage(f"The swarm key {path} is not a file; it is read again when it changes, so it must be one.")
    # An error, as a warning would be overlooked: a key that everyone can read is no secret. A group may read it.
    if mode & 0o007:
        raise BadUsage(f"The swarm key {path} can be read by every user of this machine; run `chmod 600 {path}`.")
    if len(content) > MAX_FILE_BYTES:
        raise BadUsage(f"{path} is over {MAX_FILE_BYTES} bytes long and so no swarm key; `peer key create` makes one.")
    entries = [_Entry(line.strip()) for line in content.decode("ascii", errors="replace").splitlines() if line.strip()]
    if not 0 < len(entries) <= MAX_KEYS:
        raise BadUsage(f"{path} holds {len(entries)} swarm keys; expected 1 to {MAX_KEYS}, one per line.")
    for number, entry in enumerate(entries, 1):
        try:
            _ = entry.key
        except (ValueError, binascii.Error) as error:
            raise BadUsage(f"Line {number} of {path} is no swarm key; `peer key create FILE` makes one.") from error
    return entries


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def _keys(path: Path) -> tuple[SwarmKey, ...]:
    return tuple(entry.key for entry in _read(path))


def _write(path: Path, entries: Sequence[_Entry]) -> None:
    try:
        replace_private(path, _content(entries))
    except OSError as error:
        raise BadUsage(f"{path} cannot be written: {error.strerror or error}.") from error


def _content(entries: Sequence[_Entry]) -> bytes:
    return "".join(entry.text + "\n" for entry in entries).encode()


def _version(path: Path) -> object:
    """A value that changes when the file does; None when the file is missing."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size, state.st_mode


def _seconds(date: str) -> int:
    return calendar.timegm(time.strptime(date, _DATE))
