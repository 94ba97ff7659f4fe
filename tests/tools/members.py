"""Members of swarms inside the tests' own process, and what they announce."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hivemind.dht.routing import DHTID
from hivemind.utils.timed_storage import ValueWithExpiration

from bootstrap.member import Member, MemberOptions
from bootstrap.validator import model_key
from protocol.records import ModelId, PeerRecord, Speed

HASH = "0123456789abcdef" * 2
"""Of the model that is announced."""
SOMEBODY = "QmZLpNtJqNU3utELa92YAA5urQkAyqcg1GjRDbEqbZWBhP"
"""A peer's ID."""


@asynccontextmanager
async def member(*initial_peers: str, host: str = "127.0.0.1", **options: object) -> AsyncIterator[Member]:
    joined = await Member.join(MemberOptions(initial_peers=initial_peers, host=host, **options))
    try:
        yield joined
    finally:
        await joined.shutdown()


def record(peer: Member, config_hash: str = HASH, **changes: object) -> PeerRecord:
    fields = {
        "peer_id": peer.peer_id,
        "model": ModelId(name="tiny", config_hash=config_hash, num_blocks=8),
        "start": 0,
        "end": 4,
        "dtype": "float32",
        "quantization": "none",
        "speed": Speed(decode=10, forward=1000),
        "free_cache_tokens": 100,
        "max_length": 64,
        "version": "0.1.0",
    }
    return PeerRecord(**(fields | changes))


def stored_value(member: Member, subkey: str) -> ValueWithExpiration[bytes]:
    return member._node.protocol.storage.get(DHTID.generate(source=model_key(HASH))).value.get(subkey)


async def send_store(mallory: Member, target: Member, value: bytes, expiration: float, key: str, subkey: str | None):
    """What `target` answers when mallory asks it to store these very bytes."""
    answers = []
    for in_cache in (False, True):
        answers += await mallory._node.protocol.call_store(
            target._node.peer_id,
            [DHTID.generate(source=key)],
            [value],
            [expiration],
            subkeys=[subkey],
            in_cache=in_cache,
        )
    return answers
