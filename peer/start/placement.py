"""Which blocks to serve: those that the swarm needs most."""

from collections.abc import Iterable

from protocol.records import PeerRecord, PeerState


def choose_blocks(peers: Iterable[PeerRecord], total: int, count: int) -> range:
    """The `count` of `total` blocks with the least throughput behind them.

    The window whose blocks' throughputs, sorted, are lexicographically smallest: the swarm is as fast as its weakest
    block, so holes come first (Petals, arXiv 2312.08361, section 3.2).
    """
    count = min(count, total)
    throughput = [0.0] * total
    for peer in peers:
        if peer.state != PeerState.ONLINE:
            continue
        for block in range(peer.start, min(peer.end, total)):
            throughput[block] += peer.speed.forward / (peer.end - peer.start)
    starts = range(total - count + 1)
    start = min(starts, key=lambda first: (sorted(throughput[first : first + count]), first))
    return range(start, start + count)
