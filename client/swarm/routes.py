"""Which peers to go through: the chain of hops with the least expected time."""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protocol.errors import NoRoute, TooLong
from protocol.records import PeerRecord, holes


@dataclass(frozen=True)
class Hop:
    """A part of a route: blocks [start, end) on one peer."""

    peer: PeerRecord
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.start}:{self.end}@{self.peer.name or self.peer.peer_id[-6:]}"


Cost = Callable[[PeerRecord, int], float]
"""Seconds that a peer takes for so many of its blocks, way there and back included."""


def find_route(peers: Iterable[PeerRecord], start: int, end: int, cost: Cost) -> list[Hop]:
    """The cheapest chain of hops over blocks [start, end): shortest path over block boundaries (dynamic programming).

    Raises `NoRoute`, naming the blocks that nobody serves.
    """
    useful = [peer for peer in peers if peer.start < end and peer.end > start]
    edges = sorted({start, end} | {b for p in useful for b in (p.start, p.end) if start < b < end})
    best: dict[int, tuple[float, Hop | None]] = {start: (0.0, None)}
    for number, here in enumerate(edges):
        if here not in best:
            continue
        so_far, _ = best[here]
        for peer in useful:
            if not peer.start <= here < peer.end:
                continue
            for there in edges[number + 1 : bisect_right(edges, peer.end)]:
                total = so_far + cost(peer, there - here)
                if there not in best or total < best[there][0]:
                    best[there] = (total, Hop(peer, here, there))
    if end not in best:
        raise NoRoute(describe_holes(useful, start, end))
    hops: list[Hop] = []
    while hop := best[hops[0].start if hops else end][1]:
        hops.insert(0, hop)
    return hops


def spare_blocks(peer: PeerRecord, start: int, end: int, trusted: bool) -> list[PeerRecord]:
    """A peer as it may be used when only trusted ones may see blocks [start, end): whole, or the spans around them."""
    if trusted or peer.end <= start or peer.start >= end:
        return [peer]
    around = ((peer.start, min(peer.end, start)), (max(peer.start, end), peer.end))
    return [peer.model_copy(update={"start": first, "end": last}) for first, last in around if first < last]


def check_row(peers: list[PeerRecord], start: int, end: int, row: int) -> None:
    """Raise `TooLong` where a row of so many tokens is all that keeps `peers` from training blocks [start, end)."""
    if holes(peers, start, end):
        return
    missing = holes([peer for peer in peers if peer.trains(row)], start, end)
    if missing:
        spans = ", ".join(f"{hole.start}:{hole.stop}" for hole in missing)
        raise TooLong(
            f"No peer of blocks {spans} has the memory to train rows of {row} tokens; those that serve them take "
            f"{min(_longest_row(peers, hole) for hole in missing)} at most, so shorten the rows of the batch."
        )


def _longest_row(peers: Iterable[PeerRecord], blocks: range) -> int:
    """Tokens of the longest row that peers which say what they can train could train over `blocks`."""
    found = [(peer.start, peer.end, peer.trainable.row) for peer in peers if peer.trainable]
    return min(max(row for start, end, row in found if start <= block < end) for block in blocks)


def describe_holes(peers: list[PeerRecord], start: int, end: int) -> str:
    """One sentence that names the blocks of [start, end) that none of `peers` serves."""
    spans = ", ".join(f"{hole.start}:{hole.stop}" for hole in holes(peers, start, end))
    return (
        f"Blocks {spans or f'{start}:{end}'} are served by nobody that can be reached; "
        "start a peer for them (`peer serve MODEL --blocks ...`) or try again later."
    )
