"""The libp2p carrier: raw binary streams through hivemind's p2pd (NAT traversal, relays, encryption, identities)."""

import asyncio
from contextlib import suppress

from hivemind.p2p import P2P, P2PDaemonError, PeerID

from protocol.errors import PeerUnreachable
from protocol.name import NAME
from protocol.stream import Handler, Stream
from protocol.transport.race import close_result
from protocol.transport.socket_stream import SocketStream

PROTOCOL_NAME = f"{NAME}.stream.1"
_BROKEN = (OSError, EOFError, P2PDaemonError, RuntimeError)


class LibP2PTransport:
    """A `Transport` over a running p2pd."""

    def __init__(self, p2p: P2P):
        self._p2p = p2p
        self._open = set[Stream]()

    async def connect(self, peer_id: str) -> SocketStream:
        """See `Transport.connect`."""
        opening = asyncio.create_task(self._open_stream(peer_id))
        try:
            # hivemind leaves its socket open when it is cancelled: so it may finish, and the stream is closed then.
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(close_result)
            raise

    async def serve(self, handler: Handler) -> None:
        """See `Transport.serve`."""

        async def accept(info: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer_id = info.peer_id.to_base58()  # type: ignore[attr-defined]
            try:
                stream = await SocketStream.adopt(peer_id, reader, writer)
            except _BROKEN:
                return
            self._open.add(stream)
            # Tasks are cancelled as the process ends, and asyncio would print a traceback for a cancelled one of these.
            with suppress(asyncio.CancelledError):
                try:
                    await handler(stream)
                finally:
                    self._open.discard(stream)
                    stream.close()

        await self._p2p.add_binary_stream_handler(PROTOCOL_NAME, accept)

    async def stop_serving(self) -> None:
        """See `Transport.stop_serving`."""
        await self._p2p.remove_binary_stream_handler(PROTOCOL_NAME)
        for stream in list(self._open):
            stream.close()

    async def _open_stream(self, peer_id: str) -> SocketStream:
        try:
            target = PeerID.from_base58(peer_id)
            _, reader, writer = await self._p2p.call_binary_stream_handler(target, PROTOCOL_NAME)
            return await SocketStream.adopt(peer_id, reader, writer)
        except (*_BROKEN, ValueError) as error:
            raise PeerUnreachable(f"Peer {peer_id} cannot be reached: {error}") from error
