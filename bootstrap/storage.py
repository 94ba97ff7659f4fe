"""The DHT records that a member keeps: within bounds, and of two records always the newer."""

import time
from collections.abc import Iterator

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils.timed_storage import ValueWithExpiration

MAX_LIFETIME = 600.0
"""Seconds for which a record may be stored at most."""
MAX_KEY_BYTES = 2 * 2**20
"""Bytes of values under one key: all of them travel in one answer, and p2pd carries 4 MiB."""
MAX_BYTES = 64 * 2**20

_Shelf = dict[str, ValueWithExpiration[bytes]]


class RecordStorage:
    """Replaces hivemind's `DHTLocalStorage`, as both storage and cache of a node.

    hivemind's lets a late copy of an older record shorten the life of a newer one, and hands out its own dictionaries
    for others to change. With a separate cache, one record in the cache would hide all those stored.
    """

    def __init__(self) -> None:
        self._shelves: dict[DHTID, _Shelf] = {}

    def store(self, key: DHTID, value: bytes, expiration_time: float, subkey: str | None = None) -> bool:
        """Store a record; False when a newer one is there, or no room. Values without a subkey are refused."""
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        """See `store`."""
        now = time.time()
        if not now < expiration_time <= now + MAX_LIFETIME:
            return False
        self._remove_expired(now)
        shelf = self._shelves.get(key, {})
        known = shelf.get(subkey)
        if known is not None and known.expiration_time >= expiration_time:
            return bool(known.value == value and known.expiration_time == expiration_time)
        more = len(value) - (len(known.value) if known is not None else 0)
        if _size(shelf) + more > MAX_KEY_BYTES or sum(map(_size, self._shelves.values())) + more > MAX_BYTES:
            return False
        shelf[subkey] = ValueWithExpiration(value, expiration_time)
        self._shelves[key] = shelf
        return True

    def get(self, key: DHTID) -> ValueWithExpiration[DictionaryDHTValue] | None:
        """A copy of everything under `key`, with the latest expiration time; None when there is nothing."""
        self._remove_expired(time.time())
        return _packed(self._shelves[key]) if key in self._shelves else None

    def items(self) -> Iterator[tuple[DHTID, ValueWithExpiration[DictionaryDHTValue]]]:
        """Every key with a copy of everything under it."""
        self._remove_expired(time.time())
        return ((key, _packed(shelf)) for key, shelf in list(self._shelves.items()))

    def __contains__(self, key: DHTID) -> bool:
        return self.get(key) is not None

    def _remove_expired(self, now: float) -> None:
        for key, shelf in list(self._shelves.items()):
            for subkey in [subkey for subkey, entry in shelf.items() if entry.expiration_time <= now]:
                del shelf[subkey]
            if not shelf:
                del self._shelves[key]


def _size(shelf: _Shelf) -> int:
    return sum(len(entry.value) for entry in shelf.values())


def _packed(shelf: _Shelf) -> ValueWithExpiration[DictionaryDHTValue]:
    dictionary = DictionaryDHTValue()
    with dictionary.freeze():
        for subkey, entry in shelf.items():
            dictionary.store(subkey, entry.value, entry.expiration_time)
    return ValueWithExpiration(dictionary, dictionary.latest_expiration_time)
