"""Which blocks to serve: those that the swarm needs most."""

import asyncio
from collections.abc import Iterable

from bootstrap.member import Member
from peer.span.loading import block_bytes
from peer.start.memory import WEIGHTS_SHARE, DeviceMemory
from peer.start.options import ServeOptions
from protocol.model.checkpoint import Checkpoint
from protocol.records import PeerRecord, PeerState


async def find_blocks_to_serve(options: ServeOptions, checkpoint: Checkpoint, member: Member) -> range:
    """As many blocks as `options` say or fit the memory, where the swarm needs them most. Raises `PeerUnreachable`."""
    peers = await member.directory.peers(checkpoint.model_id.config_hash)
    others = [peer for peer in peers if peer.peer_id != member.peer_id]  # the swarm may still see it as it was before
    total, count = checkpoint.model_id.num_blocks, options.num_blocks
    if count is None:
        memory = DeviceMemory.of(options.torch_device).within(options.memory_limit) * WEIGHTS_SHARE
        block = await asyncio.to_thread(block_bytes, checkpoint, options.weights_dtype, options.quantize)
        count = max(1, min(total, int(memory // block)))
    return choose_blocks(others, total, count)


def choose_blocks(peers: Iterable[PeerRecord], total: int, count: int) -> range:
    """The `count` of `total` blocks with the least throughput behind them.

    The window whose blocks' throughputs, sorted, are lexicographically smallest: the swarm is as fast as its weakest
    block, so holes come first (Petals, arXiv 2312.08361, section 3.2).
    """
    throughput = [0.0] * total
    for peer in peers:
        if peer.state != PeerState.ONLINE:
            continue
        for block in range(peer.start, min(peer.end, total)):
            throughput[block] += peer.speed.forward / (peer.end - peer.start)
    starts = range(total - count + 1)
    start = min(starts, key=lambda first: (sorted(throughput[first : first + count]), first))
    return range(start, start + count)
