"""The p2pd child process (libp2p itself, in Go): started, watched, and stopped for certain."""

import asyncio
import errno
import logging
import os
import re
import secrets
import signal
import subprocess
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, TypeVar
from uuid import UUID

import hivemind.hivemind_cli
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr

from protocol.errors import PeerFailed
from protocol.name import NAME

STOP_TIMEOUT = 1.0
"""Seconds that p2pd gets to end by itself."""
IDLE_TIMEOUT = 10
"""Seconds after which p2pd gives up waiting for our connection. It also ends when that connection closes, so that it
does not outlive a process that was killed."""
_READY = b"Peer ID:"
_STAMP = re.compile(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d ")
_CRASHES = ("panic: ", "fatal error: ")
"""What Go begins the line with that says why a program ends; behind it come all of its stacks."""
_MAX_SAID = 300
_log = logging.getLogger(__name__)
R = TypeVar("R")


class DaemonFailed(Exception):
    """p2pd ended instead of starting; the message is what it said."""


class Daemon:
    """A running p2pd."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path):
        self.gone = asyncio.Event()
        """Set when the process has ended, for whatever reason."""
        self.process_id = process.pid
        self.control = _multiaddr(socket)
        """The address at which it takes commands."""
        self._process = process
        self._socket = socket
        self._ready = asyncio.get_running_loop().create_future()
        self._said = b""
        """The end of what it has printed."""
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, options: Sequence[str], timeout: float) -> Self:
        """Start p2pd with these command line options.

        Raises `DaemonFailed` when it ends at once, `PeerFailed` when it cannot be run or is not ready in `timeout` s.
        """
        # Not in TMPDIR, which may be too long for a socket's path. Not in a folder of its own, which would be left
        # behind when this process is killed: p2pd then ends and removes its socket only.
        socket = Path(f"/tmp/{NAME}-{os.getpid()}-{secrets.token_hex(8)}.sock")
        binary = Path(str(files(hivemind.hivemind_cli) / "p2pd"))
        try:
            daemon = cls(_spawn(binary, socket, options), socket)
        except OSError as error:
            raise PeerFailed(_cannot_run(binary, error)) from error
        try:
            await asyncio.wait_for(daemon._ready, timeout)
        except TimeoutError as error:
            await daemon.stop()
            said = _in_a_line(daemon._said)
            raise PeerFailed(
                f"p2pd did not start within {timeout:g} s" + (f", and said: {said}." if said else " and said nothing.")
            ) from error
        except BaseException:
            await daemon.stop()
            raise
        return daemon

    async def stop(self) -> None:
        """End the process, by force if it has not gone after `STOP_TIMEOUT`, and remove its socket."""
        try:
            self._process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.gone.wait(), STOP_TIMEOUT)
        finally:
            self._process.kill()
            self._process.wait()
            self._watcher.cancel()
            self._socket.unlink(missing_ok=True)

    async def _watch(self) -> None:
        """Read what p2pd says; its output ends when the process does."""
        reader = asyncio.StreamReader()
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        try:
            while part := await reader.read(2**16):
                _log.debug("p2pd: %s", part.decode(errors="replace").rstrip())
                self._said = (self._said + part)[-(2**16) :]
                if _READY in self._said and not self._ready.done():
                    self._ready.set_result(None)
        finally:
            pipe.close()
            self.gone.set()
            if not self._ready.done():
                # Its output is closed, so its end is a matter of milliseconds.
                code = await asyncio.to_thread(self._process.wait)
                self._ready.set_exception(DaemonFailed(_in_a_line(self._said) or _silent_end(code)))


class Connection(P2P):  # type: ignore[misc]
    """hivemind's connection to a p2pd, whose calls fail when p2pd ends; hivemind 1.1.12 lets them hang for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = asyncio.Event()

    @classmethod
    async def open(cls, control: Multiaddr) -> Self:
        """Connect to the p2pd that takes commands at `control`. Raises `PeerFailed` when it has ended."""
        try:
            p2p: Self = await cls.replicate(control)
        except (OSError, EOFError) as error:
            raise PeerFailed("p2pd ended right after its start.") from error
        # Nobody awaits hivemind's writer, and asyncio would print its traceback when p2pd dies.
        p2p._client.control._write_task.add_done_callback(lambda task: task.cancelled() or task.exception())
        p2p._client.control._pending_calls = _Calls(p2p._client.control._pending_calls)
        return p2p

    async def dial(self, peer_id: PeerID, addresses: Sequence[Multiaddr]) -> None:
        """Connect p2pd to a peer at `addresses` (without /p2p). Raises `P2PDaemonError`."""
        await self._until_broken(self._client.connect(peer_id, addresses))

    async def connections(self, peer_id: PeerID) -> list[Multiaddr]:
        """The other ends of the connections to a peer, as p2pd sees them. Raises `P2PDaemonError`."""
        others = await self._until_broken(self._client.list_peers())
        return [address for other in others if other.peer_id == peer_id for address in other.addrs]

    async def visible_addresses(self) -> Sequence[Multiaddr]:
        """The addresses that p2pd sees for itself now. Raises `OSError` or `EOFError`."""
        addresses: Sequence[Multiaddr] = (await self._until_broken(self._client.identify()))[1]
        return addresses

    async def add_protobuf_handler(self, *args: Any, **kwargs: Any) -> None:
        """See `P2P`."""
        await self._until_broken(super().add_protobuf_handler(*args, **kwargs))

    async def remove_protobuf_handler(self, *args: Any, **kwargs: Any) -> None:
        """See `P2P`."""
        await self._until_broken(super().remove_protobuf_handler(*args, **kwargs))

    async def call_protobuf_handler(self, *args: Any, **kwargs: Any) -> Any:
        """See `P2P`."""
        return await self._until_broken(super().call_protobuf_handler(*args, **kwargs))

    async def add_binary_stream_handler(self, *args: Any, **kwargs: Any) -> None:
        """See `P2P`."""
        await self._until_broken(super().add_binary_stream_handler(*args, **kwargs))

    async def remove_binary_stream_handler(self, *args: Any, **kwargs: Any) -> None:
        """See `P2P`."""
        await self._until_broken(super().remove_binary_stream_handler(*args, **kwargs))

    async def call_binary_stream_handler(self, *args: Any, **kwargs: Any) -> Any:
        """See `P2P`."""
        return await self._until_broken(super().call_binary_stream_handler(*args, **kwargs))

    async def _until_broken(self, call: Coroutine[Any, Any, R]) -> R:
        task, broken = asyncio.ensure_future(call), asyncio.ensure_future(self.broken.wait())
        try:
            await asyncio.wait({task, broken}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise P2PDaemonError("this machine's p2pd process is gone")
            return task.result()
        finally:
            task.cancel()
            broken.cancel()


class _Calls(dict[UUID, asyncio.Future[Any]]):
    """hivemind's calls that wait for an answer: one that was cancelled a moment ago is none of them any more.

    hivemind 1.1.12 gives such a call its answer all the same, which ends the task that reads all other answers.
    """

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)  # type: ignore[call-overload]
        return future is not None and not future.done()


def _multiaddr(socket: Path) -> Multiaddr:
    return Multiaddr(f"/unix{socket}")


def _in_a_line(said: bytes) -> str:
    """What p2pd gave as the reason why it ended, in one line without a full stop; empty if it said nothing."""
    lines = [_STAMP.sub("", line).strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    crash = next((line for line in lines if line.startswith(_CRASHES)), lines[-1] if lines else "")
    return "".join(letter if letter.isprintable() else " " for letter in crash[:_MAX_SAID]).rstrip(" .")


def _silent_end(code: int) -> str:
    if code == -signal.SIGKILL:
        return "it was killed without a word, as a system does that has run out of memory"
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name} without a word"
    return f"it ended with exit code {code} without a word"


def _cannot_run(binary: Path, error: OSError) -> str:
    again = "install hivemind again (`pip install --force-reinstall hivemind`)"
    if error.errno == errno.ENOENT and not binary.exists():
        return f"hivemind's p2pd is missing, which should be {binary}; {again}."
    if error.errno == errno.EACCES:
        return (
            f"hivemind's p2pd may not be run: {binary} is not executable, or its disk is mounted with noexec; run "
            f"`chmod +x {binary}`, or install into another folder."
        )
    if error.errno == errno.ENOEXEC:
        return f"hivemind's p2pd ({binary}) is damaged, or for another kind of machine; {again}."
    return f"hivemind's p2pd ({binary}) cannot be run: {error.strerror or error}."


def _spawn(binary: Path, socket: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(binary), f"-listen={_multiaddr(socket)}", f"-idleTimeout={IDLE_TIMEOUT}s", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"GOLOG_LOG_LEVEL": "error"},
        # Ctrl-C must not reach p2pd: it would end at once, before this member has left the swarm in order.
        start_new_session=True,
    )
