"""`peer status`: who serves what, how fast, how full; holes shown loudly."""

from collections import Counter
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bootstrap.directory import Directory
from protocol.records import ModelId, PeerRecord, PeerState, SharedModel, WeightsRecord, holes

Models = dict[ModelId, list[PeerRecord]]
Weights = list[WeightsRecord]
Complaints = dict[ModelId, Counter[str]]
"""Model -> ID of a peer -> how many clients say that it answered wrongly."""


async def read_complaints(directory: Directory, models: Models) -> Complaints:
    """What clients say of the peers of `models`. Raises `PeerUnreachable`."""
    return {model: await directory.complaints(model.config_hash) for model in models}


def as_json(models: Models, complaints: Complaints, weights: Weights) -> list[dict[str, Any]]:
    """The swarm's state as plain data: a model whose files are given without its blocks being served has no peers."""
    given = {one.model.config_hash: one.model for record in weights for one in record.models}
    served = {model.config_hash for model in models}
    models = models | {model: [] for config_hash, model in given.items() if config_hash not in served}
    return [
        {
            "model": model.name,
            "config_hash": model.config_hash,
            "num_blocks": model.num_blocks,
            "holes": [[hole.start, hole.stop] for hole in _missing(model, peers)],
            "peers": [
                peer.model_dump(mode="json", exclude={"model"}) | {"complaints": complaints[model][peer.peer_id]}
                for peer in peers
            ],
            "weights": [
                {"peer_id": record.peer_id, "name": record.name} | one.model_dump(mode="json", exclude={"model"})
                for record in weights
                for one in record.models
                if one.model.config_hash == model.config_hash
            ],
        }
        for model, peers in models.items()
    ]


def as_table(models: Models, complaints: Complaints, weights: Weights) -> RenderableType:
    """The swarm's state for a terminal."""
    parts: list[RenderableType] = []
    if not models:
        parts.append(Text("No peer serves any model in this swarm.", style="bold red"))
    for model, peers in models.items():
        title = Text(f"{model.name}: {model.num_blocks} blocks, {len(peers)} peers", style="table.title")
        parts += [title, _peers_table(peers), *_memory_table(peers), _coverage(model, peers)]
        parts += [_complaint(peer, count) for peer in peers if (count := complaints[model][peer.peer_id])]
    parts += [_weights(record, one) for record in weights for one in record.models]
    return Group(*parts)


def _missing(model: ModelId, peers: list[PeerRecord]) -> list[range]:
    return holes([peer for peer in peers if peer.state == PeerState.ONLINE], 0, model.num_blocks)


def _peers_table(peers: list[PeerRecord]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))  # narrow: 80 columns are what many have
    for column in (
        "blocks",
        "peer",
        "state",
        "weights",
        "decode\ntok/s",
        "forward\ntok/s",
        "cache tokens\nfree",
        "users",
    ):
        table.add_column(column, overflow="fold")
    for peer in peers:
        count = peer.end - peer.start
        cells = (
            f"{peer.start}:{peer.end}",
            _name(peer),
            peer.state.value,
            peer.dtype if peer.quantization == "none" else f"{peer.quantization}/{peer.dtype}",
            f"{peer.speed.decode / count:,.0f}",
            f"{peer.speed.forward / count:,.0f}",
            f"{peer.free_cache_tokens:,}",
            str(peer.sessions),
        )
        table.add_row(*map(Text, cells))  # others' text: no markup
    return table


def _memory_table(peers: list[PeerRecord]) -> list[Table]:
    """What is used of each peer's memory, of those that say it."""
    told = [(peer, peer.memory) for peer in peers if peer.memory]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("memory used", "KV caches", "kept activations", "adapters"):
        table.add_column(column, overflow="fold")
    for peer, memory in told:
        shares = (memory.cache, memory.kept, memory.adapters)
        table.add_row(*map(Text, (_name(peer), *(share.describe() for share in shares))))
    return [table] if told else []


def _name(peer: PeerRecord) -> str:
    return peer.name or f"…{peer.peer_id[-8:]}"


def _complaint(peer: PeerRecord, count: int) -> Text:
    who = f"{peer.name} ({peer.peer_id})" if peer.name else peer.peer_id
    return Text(f"WRONG ANSWERS: {count} client(s) found that {who} answers wrongly.", style="bold red")


def _weights(record: WeightsRecord, one: SharedModel) -> Text:
    who = record.name or f"…{record.peer_id[-8:]}"
    what = f"{one.model.name}@{one.manifest[:12]}"
    if one.held >= one.wanted:
        return Text(f"{who} gives {one.held / 1e6:,.1f} MB of {what}.")
    share, left = one.held / one.wanted, (one.wanted - one.held) / max(one.rate, 1.0)
    how = f"{share:.0%} of {one.wanted / 1e6:,.1f} MB at {one.rate / 1e6:,.1f} MB/s, {left:,.0f} s left"
    return Text(f"{who} is fetching {what}: {how}.")


def _coverage(model: ModelId, peers: list[PeerRecord]) -> Text:
    missing = _missing(model, peers)
    if not missing:
        return Text(f"All {model.num_blocks} blocks are served.", style="green")
    spans = ", ".join(f"{hole.start}:{hole.stop}" for hole in missing)
    return Text(f"HOLES: nobody serves blocks {spans}; the model cannot be used.", style="bold red")
