"""The message PutAdapter, and finding the adapter that another request is to be run with."""

from functools import partial

from peer.adapters.store import AdapterStore, StoredAdapter
from peer.compute.scheduler import Priority
from peer.service.connection import Connection
from protocol import swarm_pb2 as pb
from protocol.channel import Message


class Adapters:
    """Keeps clients' adapters."""

    def __init__(self, store: AdapterStore):
        self.store = store

    async def put(self, connection: Connection, message: Message, body: pb.PutAdapter) -> Message:
        """Keep an adapter. The answer has its hash, by which other requests name it."""
        work = partial(self.store.put, body.manifest, message.tensors, connection.client)
        return Message(pb.Result(token=await connection.compute(Priority.CALL, work)))

    def find(self, connection: Connection, context: pb.Context) -> StoredAdapter | None:
        """What a request names as its adapter; `None` when it names none. Raises `UnknownAdapter`."""
        return self.store.get(context.adapter, connection.client) if context.adapter else None
