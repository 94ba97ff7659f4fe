"""The p2pd child process (libp2p itself, in Go): started, watched, and stopped for certain."""

import asyncio
import logging
import os
import secrets
import subprocess
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, TypeVar

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
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, options: Sequence[str], timeout: float) -> Self:
        """Start p2pd with these command line options.

        Raises `DaemonFailed` when it ends at once, `PeerFailed` when it cannot be run or is silent for `timeout` s.
        """
        # Not in TMPDIR, which may be too long for a socket's path. Not in a folder of its own, which would be left
        # behind when this process is killed: p2pd then ends and removes its socket only.
        socket = Path(f"/tmp/{NAME}-{os.getpid()}-{secrets.token_hex(8)}.sock")
        try:
            daemon = cls(_spawn(socket, options), socket)
        except OSError as error:
            raise PeerFailed(f"hivemind's p2pd cannot be run ({error}); install hivemind again.") from error
        try:
            await asyncio.wait_for(daemon._ready, timeout)
        except TimeoutError as error:
            await daemon.stop()
            raise PeerFailed(f"p2pd did not start within {timeout:g} s.") from error
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
        said = b""
        try:
            while part := await reader.read(2**16):
                _log.debug("p2pd: %s", part.decode(errors="replace").rstrip())
                said = (said + part)[-2000:]
                if _READY in said and not self._ready.done():
                    self._ready.set_result(None)
        finally:
            pipe.close()
            self.gone.set()
            if not self._ready.done():
                self._ready.set_exception(DaemonFailed(said.decode(errors="replace").strip() or "no reason given"))


class Connection(P2P):  # type: ignore[misc]
    """hivemind's connection to a p2pd, whose calls fail when p2pd ends; hivemind 1.1.12 lets them hang for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = asyncio.Event()

    @classmethod
    async def open(cls, control: Multiaddr) -> Self:
        """Connect to the p2pd that takes commands at `control`. Raises `OSError`, `EOFError`."""
        p2p: Self = await cls.replicate(control)
        # Nobody awaits hivemind's writer, and asyncio would print its traceback when p2pd dies.
        p2p._client.control._write_task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return p2p

    async def dial(self, peer_id: PeerID, addresses: Sequence[Multiaddr]) -> None:
        """Connect p2pd to a peer at `addresses` (without /p2p). Raises `P2PDaemonError`."""
        await self._until_broken(self._client.connect(peer_id, addresses))

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


def _multiaddr(socket: Path) -> Multiaddr:
    return Multiaddr(f"/unix{socket}")


def _spawn(socket: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    binary = files(hivemind.hivemind_cli) / "p2pd"
    return subprocess.Popen(
        [str(binary), f"-listen={_multiaddr(socket)}", f"-idleTimeout={IDLE_TIMEOUT}s", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"GOLOG_LOG_LEVEL": "error"},
        # Ctrl-C must not reach p2pd: it would end at once, before this member has left the swarm in order.
        start_new_session=True,
    )
