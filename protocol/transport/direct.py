"""The direct carrier: TLS connections to a peer's own port, for ends that can reach each other."""

import asyncio
import logging
import socket
import weakref
from collections import Counter
from functools import partial

from protocol.errors import PeerUnreachable, SwarmError
from protocol.records import Door
from protocol.stream import Handler
from protocol.transport.certificate import Certificate, caller_context, has_fingerprint
from protocol.transport.introduction import Credentials, identify, introduce
from protocol.transport.race import first
from protocol.transport.socket_stream import SocketStream

CALL_TIMEOUT = 4.0
"""Seconds for a connection to a peer to be up, introduction included."""
STRANGER_TIMEOUT = 10.0
"""Seconds that a caller gets until it has introduced itself."""
MAX_STRANGERS, MAX_STRANGERS_OF_HOST = 64, 32
"""Connections without introduction that are kept, of all hosts together and of one host; more are closed at once."""
MAX_STREAMS = 512
"""Connections from others, so that files and memory are left for the rest. Further callers come by libp2p."""
_MAX_CALLS = 16
"""Connections to one peer that are made at the same time; more wait, or the peer would refuse them as strangers."""
_NEXT_ADDRESS = 0.1
"""Seconds that one address of a peer gets before the next is tried too."""
_CLOSING = 5.0
"""Seconds that the other end gets to take what was sent to it last."""
_PAUSE = 0.5
"""Seconds until the next attempt to accept, when this process has no more files."""
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
"""Seconds, the last in milliseconds. A machine that is gone is noticed after about 10 s by an end that only waits for
it, and after 60 s by an end that was sending. TCP_USER_TIMEOUT also ends connections to an end that takes nothing."""
_log = logging.getLogger(__name__)


class DirectCaller:
    """Makes direct connections to other peers."""

    def __init__(self, me: Credentials):
        self._me = me
        self._context = caller_context()
        self._open = weakref.WeakSet[SocketStream]()
        self._turns = weakref.WeakValueDictionary[str, asyncio.Semaphore]()

    async def connect(self, peer_id: str, door: Door) -> SocketStream:
        """A new stream to `peer_id` by its `door`. Raises `PeerUnreachable`."""
        turn = self._turns.setdefault(peer_id, asyncio.Semaphore(_MAX_CALLS))
        fingerprint = bytes.fromhex(door.fingerprint)
        try:
            async with turn, asyncio.timeout(CALL_TIMEOUT):
                ways = [partial(self._dial, peer_id, host, port, fingerprint) for host, port in door.addresses]
                stream = await first(ways, _NEXT_ADDRESS)
                try:
                    await introduce(stream, self._me, fingerprint, CALL_TIMEOUT)
                except BaseException:
                    stream.close()
                    raise
        except (OSError, TimeoutError, PeerUnreachable) as error:
            reason = str(error) or "it does not answer"
            raise PeerUnreachable(f"Peer {peer_id} cannot be reached directly: {reason}") from error
        self._open.add(stream)
        return stream

    def close(self) -> None:
        """Close every stream that was made here."""
        for stream in list(self._open):
            stream.close()

    async def _dial(self, peer_id: str, host: str, port: int, fingerprint: bytes) -> SocketStream:
        transport, stream = await asyncio.get_running_loop().create_connection(
            partial(SocketStream, peer_id),
            host,
            port,
            ssl=self._context,
            server_hostname="",
            ssl_handshake_timeout=CALL_TIMEOUT,
            ssl_shutdown_timeout=_CLOSING,
        )
        if not has_fingerprint(transport, fingerprint):
            transport.abort()
            raise PeerUnreachable(f"who answers at {host}, port {port}, is not the peer.")
        _keep_alive(transport.get_extra_info("socket"))
        return stream


class DirectListener:
    """Accepts direct connections; callers must introduce themselves first."""

    def __init__(self, me: Credentials, listener: socket.socket):
        """`listener`: a TCP socket that is bound to an address."""
        self._me, self._listener = me, listener
        self._certificate = Certificate()
        self._accepting: asyncio.Task[None] | None = None
        self._strangers = Counter[str]()
        """Host -> how many of its connections are without introduction."""
        self._open = set[SocketStream]()
        self._tasks = set[asyncio.Task[None]]()

    @property
    def port(self) -> int:
        """The port that is listened at."""
        return int(self._listener.getsockname()[1])

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the certificate (DER), hexadecimal."""
        return self._certificate.fingerprint.hex()

    async def serve(self, handler: Handler) -> None:
        """See `Transport.serve`."""
        self._listener.setblocking(False)
        self._listener.listen()
        self._accepting = asyncio.create_task(self._accept(handler))

    def close(self) -> None:
        """Accept no further streams, and close those that are open."""
        if self._accepting is not None:
            self._accepting.cancel()
        self._listener.close()
        for stream in list(self._open):
            stream.close()

    async def _accept(self, handler: Handler) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:
                _log.warning("no connection can be accepted: %s", error)
                await asyncio.sleep(_PAUSE)
                continue
            task = asyncio.create_task(self._answer(connection, address[0], handler))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, connection: socket.socket, host: str, handler: Handler) -> None:
        stream = await self._meet(connection, host)
        if stream is None:
            return
        self._open.add(stream)
        try:
            await handler(stream)
        finally:
            self._open.discard(stream)
            stream.close()

    async def _meet(self, connection: socket.socket, host: str) -> SocketStream | None:
        """The stream of a caller that has introduced itself; closed, and None, for any other."""
        is_full = self._strangers.total() >= MAX_STRANGERS or len(self._open) >= MAX_STREAMS
        if is_full or self._strangers[host] >= MAX_STRANGERS_OF_HOST:
            connection.close()
            return None
        self._strangers[host] += 1
        try:
            async with asyncio.timeout(STRANGER_TIMEOUT):
                return await self._identified(connection)
        except (OSError, TimeoutError, SwarmError) as error:
            _log.debug("caller from %s not let in: %r", host, error)
            return None
        finally:
            self._strangers[host] -= 1
            if not self._strangers[host]:
                del self._strangers[host]

    async def _identified(self, connection: socket.socket) -> SocketStream:
        _keep_alive(connection)
        stream = SocketStream()
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
            lambda: stream,  # uvloop returns another protocol than this
            connection,
            ssl=self._certificate.context,
            ssl_handshake_timeout=STRANGER_TIMEOUT,
            ssl_shutdown_timeout=_CLOSING,
        )
        try:
            stream.remote = await identify(stream, self._me, self._certificate.fingerprint, STRANGER_TIMEOUT)
        except BaseException:
            transport.abort()
            raise
        return stream


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
