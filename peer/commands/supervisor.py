"""Peers as processes of their own: one for each of several devices, started again when they fail if that is wanted."""

import asyncio
import ctypes
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from peer.commands.process import stop_on_signals

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0
"""Seconds before a peer that failed is started again: doubled each time, unless it ran for the longest of them."""
_READY = b"ready address="
_BAD_USAGE = 2
_LONGEST_LINE = 2**20
_PR_SET_PDEATHSIG = 1


class Supervisor:
    """Runs peers, one begun when the one before it is ready, until they have all ended."""

    def __init__(self, restarts: bool):
        """`restarts`: a peer that fails is started again; not where it was told something wrong from the start."""
        self._restarts = restarts
        self._stop = stop_on_signals()
        self._peers: list[_Peer] = []
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._send, signal.SIGUSR1)

    @property
    def addresses(self) -> list[str]:
        """Of the peers that run."""
        return [peer.address for peer in self._peers if peer.address]

    async def run(self, labels: Sequence[str], argv: Callable[[int], Sequence[str]]) -> int:
        """Run a peer for each label, with the command line that `argv` says for its index whenever it is started.

        Returns the exit code: 0 when all have left in order. A peer that never gets ready ends the others; one that
        fails later does not, as they serve well without it.
        """
        stopping = asyncio.create_task(self._stop_all())
        tasks = list[asyncio.Task[int]]()
        for index, label in enumerate(labels):
            peer = _Peer(label if len(labels) > 1 else "")
            self._peers.append(peer)
            tasks.append(asyncio.create_task(self._keep(peer, partial(argv, index))))
            ready = asyncio.create_task(peer.ready.wait())
            await asyncio.wait({tasks[-1], ready}, return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if not peer.ready.is_set():
                self._stop.set()
                break
        codes = await asyncio.gather(*tasks)
        stopping.cancel()
        return max(codes)

    async def _keep(self, peer: "_Peer", argv: Callable[[], Sequence[str]]) -> int:
        """Run a peer until it ends for good; its exit code, 1 for a signal's."""
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            code = await peer.run(argv(), self._stop)
            if code == 0 or (self._stop.is_set() and code < 0):  # told to stop before it could listen
                return 0
            what = f"the peer{peer.place} ended with exit code {code}"
            is_wrong_from_the_start = code == _BAD_USAGE and not peer.ready.is_set()
            if self._stop.is_set() or not self._restarts or is_wrong_from_the_start:
                logger.error("%s", what)
                return code if code > 0 else 1
            pause = FIRST_PAUSE if time.monotonic() - began > LONGEST_PAUSE else pause
            logger.error("%s; it is started again in %g s", what, pause)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)
                return 0
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _stop_all(self) -> None:
        await self._stop.wait()
        self._send(signal.SIGTERM)

    def _send(self, number: int) -> None:
        for peer in self._peers:
            peer.send(number)


class _Peer:
    """A peer's process, and the next ones in its place."""

    def __init__(self, label: str):
        """`label`: what its lines in the log begin with, if anything."""
        self.ready = asyncio.Event()
        """Set when it has been ready once."""
        self.address = ""
        """Where others join, while it runs and is ready."""
        self.place = label and f" on {label}"
        self._prefix = label and f"{label}: "
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, argv: Sequence[str], stop: asyncio.Event) -> int:
        """Run the process to its end; its exit code, negative for a signal's."""
        self._process = process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
            start_new_session=True,  # Ctrl-C must not reach it twice: this process passes it on
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        if stop.is_set():
            self.send(signal.SIGTERM)
        assert process.stdout
        assert process.stderr
        await asyncio.gather(self._relay(process.stdout), self._log(process.stderr))
        self.address = ""
        return await process.wait()

    def send(self, number: int) -> None:
        """Send a signal to the process, if it runs."""
        if self._process and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _relay(self, output: asyncio.StreamReader) -> None:
        async for line in output:
            _write(sys.stdout.buffer.write, line)
            if line.startswith(_READY):
                self.address = line.split()[1].decode().removeprefix("address=")
                self.ready.set()

    async def _log(self, output: asyncio.StreamReader) -> None:
        async for line in output:
            _write(sys.stderr.buffer.write, self._prefix.encode() + line)


def _write(write: Callable[[bytes], int], line: bytes) -> None:
    with suppress(OSError):  # a full disk, or a pipe that nobody reads any more: the peers serve on
        write(line)
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with_parent() -> None:
    """In the child, on Linux: also where this process is killed, the peer is told to leave."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
