"""Training within a peer's memory: what calls keep is foreseen, and what does not fit is computed again by blocks."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from peer.adapters.store import AdapterStore, StoredAdapter
from peer.span.span import Inputs, Mode, Span
from peer.start.memory import Budget
from peer.training.call import TrainingCall
from peer.training.kept import Checkpoints, Graph
from peer.training.trainer import Trainer
from protocol.errors import BadUsage, TooLong, UnknownCall
from protocol.records import Trainable
from tests.tools.lora import put_lora
from tests.tools.scarce_memory import ScarceMemory
from tests.tools.spans import END, START, states
from tests.tools.wire import Wire

TARGETS = {
    "llama": ("1.self_attn.q_proj", "2.mlp.down_proj", "3.self_attn.v_proj"),
    "bloom": ("1.self_attention.query_key_value", "2.mlp.dense_h_to_4h", "3.self_attention.dense"),
    "gpt2": ("1.attn.c_attn", "2.mlp.c_fc", "3.attn.c_attn"),
    "opt": ("1.self_attn.q_proj", "2.fc1", "3.fc2"),
    "olmo2": ("1.self_attn.q_proj", "2.mlp.down_proj", "3.self_attn.v_proj"),
    "qwen3_moe": ("1.self_attn.q_proj", "2.self_attn.o_proj"),
    "gemma3": ("1.self_attn.q_proj", "2.mlp.down_proj", "3.self_attn.v_proj"),
}
AMPLE = 10**9


class Desk:
    """A span, a trainer with so many bytes for what is kept and for all, and calls for it."""

    def __init__(self, span: Span, kept: int = AMPLE, room: int = AMPLE):
        self.span, self.store = span, AdapterStore(span, 10**8, 64, 10**8)
        self.trainer = Trainer(span, self.store, kept, room)

    def put(self, family: str, **options: Any) -> StoredAdapter:
        return put_lora(self.store, self.span, TARGETS[family], 4, 1, **options)

    def call(self, rows: int, tokens: int, adapter: StoredAdapter | None = None, **options: Any) -> TrainingCall:
        prefix = {}
        if length := options.pop("prefix", 0):
            for block in self.span.blocks:
                sizes = [shape.sizes for shape in self.span.kv_shapes[block]]
                prefix[block] = tuple(torch.randn(rows, heads, length, size) for heads, size in sizes)
        mask = torch.ones(rows, tokens + length, dtype=torch.long)
        mask[0, length : length + tokens // 3] = 0
        inputs = Inputs(states(rows, tokens, 1), mask if options.pop("padded", True) else None)
        mode = Mode(self.span.blocks, **({"training": True, "dropout_seed": 7} | options))
        return TrainingCall(inputs, mode, adapter, prefix)  # type: ignore[arg-type]

    def pass_(self, call: TrainingCall) -> list[dict[str, torch.Tensor]]:
        """The result, and the gradients both from what was kept and by computing the forward again."""
        hidden, call_id = self.trainer.forward(call, "me", keep=True)
        grad = states(*hidden.shape[:2], 50)
        kept = self.trainer.backward_kept(call_id, "me", grad)
        return [{"hidden": hidden}, kept, self.trainer.backward(call, grad)]


def sparing(desk: Desk, call: TrainingCall) -> Desk:
    """A desk with just so much memory that the call's blocks have to be computed again."""
    footprint = desk.trainer.footprint
    return Desk(desk.span, footprint.of(call) - 1, footprint.of_checkpoints(call))


KINDS: list[dict[str, Any]] = [{}, {"padded": False}, {"autocast": torch.bfloat16}, {"prefix": 3}, {"training": False}]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", kind) for kind in KINDS),
        *((family, {}) for family in TARGETS if family not in ("llama", "olmo2")),
        ("olmo2", {"autocast": torch.bfloat16}),
    ],
    ids=str,
)
def test_blocks_computed_again_give_the_same_bits(
    spans: Callable[..., Span], family: str, kind: dict[str, Any]
) -> None:
    desk = Desk(spans(family))
    adapter = desk.put(family, lora_dropout=0.2)
    call = desk.call(2, 120, adapter, **kind)
    expected = desk.pass_(call)
    again = sparing(desk, call)
    assert isinstance(desk.trainer._passed(call, "", None, False), Graph)
    assert isinstance(again.trainer._passed(call, "", None, False), Checkpoints)
    for ours, theirs in zip(again.pass_(call), expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("quantization", ["nf4"])
def test_quantized_blocks_too(spans: Callable[..., Span], quantization: str) -> None:
    desk = Desk(spans("llama", quantization=quantization))
    call = desk.call(1, 90, desk.put("llama"))
    for ours, theirs in zip(sparing(desk, call).pass_(call), desk.pass_(call), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("padded", [False, True])
def test_what_a_call_keeps_is_foreseen(spans: Callable[..., Span], family: str, padded: bool) -> None:
    desk = Desk(spans(family))
    for adapter in (None, desk.put(family, lora_dropout=0.1)):
        for rows, tokens in ((1, 16), (3, 100), (1, 300)):
            call = desk.call(rows, tokens, adapter, padded=padded)
            foreseen = desk.trainer.footprint.of(call)
            kept = desk.trainer._passed(call, "", None, False).size
            assert kept <= foreseen * 1.02 + 2000, (rows, tokens)
            assert foreseen <= kept * 1.25 + 20_000, (rows, tokens)


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2", "gemma3"])
def test_what_a_call_takes_is_foreseen(spans: Callable[..., Span], family: str) -> None:
    """Of a whole graph, and where blocks are computed again: also long rows, whose attention is most of it."""
    desk = Desk(spans(family))
    for adapter in (None, desk.put(family, lora_dropout=0.1)):
        for rows, tokens in ((2, 100), (1, 700)):
            call = desk.call(rows, tokens, adapter, padded=False)
            for sparing, foreseen in (
                (False, desk.trainer.footprint.of_run),
                (True, desk.trainer.footprint.of_checkpoints),
            ):
                foreseen(call)  # measures
                with ScarceMemory() as memory:
                    desk.trainer._passed(call, "", None, sparing).backward(states(rows, tokens, 2))
                assert memory.peak <= foreseen(call) * 1.02 + 20_000, (rows, tokens, sparing)
                assert foreseen(call) <= memory.peak * 1.35 + 20_000, (rows, tokens, sparing)


def test_what_is_kept_by_blocks_is_foreseen(spans: Callable[..., Span]) -> None:
    desk = Desk(spans("llama"))
    call = desk.call(2, 120, padded=False)
    again = sparing(desk, call)
    kept = again.trainer._passed(call, "", None, False)
    assert kept.size < desk.trainer.footprint.of_checkpoints(call) < desk.trainer.footprint.of_run(call)


def test_a_row_too_long_even_for_that_is_refused(spans: Callable[..., Span]) -> None:
    desk = Desk(spans("llama"))
    call = desk.call(1, 120)
    least = desk.trainer.footprint.of_checkpoints(call)
    short = Desk(desk.span, least, least - 1000).trainer
    told = rf"To train blocks {START}:{END} with 1 x 120 tokens takes {least / 1e6:,.1f} MB of memory at least"
    for ask in (
        lambda: short.forward(call, "me", keep=True),
        lambda: short.backward(call, states(1, 120, 2)),
    ):
        with pytest.raises(TooLong, match=told):
            ask()
    assert short.forward(call, "me", keep=False)[0].shape == (1, 120, desk.span.hidden_size)


def test_kept_calls_give_way_to_one_that_needs_their_memory(spans: Callable[..., Span]) -> None:
    ample = Desk(spans("llama"))
    call, footprint = ample.call(2, 120), ample.trainer.footprint
    desk = Desk(ample.span, footprint.of(call), footprint.of_run(call) + footprint.of(call) // 2)
    _, first = desk.trainer.forward(call, "me", keep=True)
    desk.trainer.backward(call, states(2, 120, 2))
    with pytest.raises(UnknownCall):
        desk.trainer.backward_kept(first, "me", states(2, 120, 2))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_what_can_be_trained_is_found(spans: Callable[..., Span], family: str) -> None:
    """The longest row, to the token; and the tokens that there is memory for, shared by the clients that train."""
    ample = Desk(spans(family))
    call, footprint = ample.call(1, 150, padded=False), ample.trainer.footprint
    state = call.inputs.hidden.nbytes // 150 * (len(ample.span.blocks) + 1)
    desk = Desk(ample.span, 200 * state, footprint.of_checkpoints(call))
    assert desk.trainer.trainable is None
    desk.trainer.measure(500)
    assert desk.trainer.trainable == Trainable(row=150, tokens=150)
    desk.trainer.backward(call, states(1, 150, 2))
    with pytest.raises(TooLong):
        desk.trainer.backward(desk.call(1, 151, padded=False), states(1, 151, 2))
    for client in ("ann", "bob"):
        desk.trainer.forward(desk.call(1, 9), client, keep=True)
    assert desk.trainer.trainable == Trainable(row=150, tokens=100)
    desk.trainer.kept.forget("ann")
    assert desk.trainer.trainable == Trainable(row=150, tokens=150)
    desk.trainer.measure(100)
    assert desk.trainer.trainable == Trainable(row=100, tokens=150)


# ---- what a peer's memory is for


@pytest.mark.parametrize("cache_tokens", [None, 1, 1000, 20_000])
def test_the_shares_add_up_to_what_is_free(cache_tokens: int | None) -> None:
    budget = Budget.of(10**9, 50_000, cache_tokens, 8192)
    assert budget.cache + budget.kept + budget.adapters + budget.call == 10**9
    assert budget.cache == budget.cache_tokens * 50_000
    assert budget.kept <= budget.call
    assert budget.max_length == min(8192, budget.cache_tokens)
    if cache_tokens is None:
        assert budget.cache <= 10**9 / 4, "8,192 tokens would take 410 MB"


def test_what_is_used_of_the_shares(spans: Callable[..., Span]) -> None:
    desk, budget = Desk(spans("llama")), Budget.of(10**9, 50_000, 1000, 8192)
    assert budget.shares(1000, desk.trainer.kept.size, desk.store.size).describe() == (
        "KV caches 0.0% of 0.05 GB, kept activations 0.0% of 0.32 GB, adapters 0.0% of 0.25 GB"
    )
    adapter = desk.put("llama")
    assert desk.store.size >= adapter.size
    call = desk.call(2, 10, adapter)
    _, call_id = desk.trainer.forward(call, "me", keep=True)
    shares = budget.shares(250, desk.trainer.kept.size, desk.store.size)
    assert (shares.cache.used, shares.cache.total) == (750 * 50_000, 50_000_000)
    assert shares.kept.used == pytest.approx(desk.trainer.footprint.of(call), rel=0.1)
    assert shares.adapters.used == desk.store.size
    desk.trainer.backward_kept(call_id, "me", states(2, 10, 3))
    assert desk.trainer.kept.size == 0
    desk.store.forget("me")
    assert desk.store.size == 0


@pytest.mark.parametrize("row", [0, 500, 700, 800, 2000])
@pytest.mark.parametrize("cache_tokens", [None, 2048])
def test_a_row_that_is_to_be_trained_comes_first(row: int, cache_tokens: int | None) -> None:
    """Adapters keep a twentieth, and caches that nobody has asked for room for one row, or a quarter."""
    free, row = 10**9, row * 10**6
    budget = Budget.of(free, 50_000, cache_tokens, 8192, row)
    assert budget.cache + budget.kept + budget.adapters + budget.call == free
    assert budget.kept <= budget.call
    assert budget.adapters >= free // 20
    assert budget.cache_tokens >= 2048
    assert budget.kept + budget.call >= min(row, free - 2048 * 50_000 - free // 20)
    if row <= 500 * 10**6:
        assert budget == Budget.of(free, 50_000, cache_tokens, 8192)


def test_more_cache_than_there_is_memory() -> None:
    with pytest.raises(BadUsage, match=r"it would take 1.50 GB, and 1.00 GB are free; choose fewer"):
        Budget.of(10**9, 50_000, 30_000, 8192)


def test_a_peer_says_what_its_memory_is_for(opened_wire: Wire) -> None:
    said = opened_wire.peer.stderr.read_text()
    assert re.search(r"memory: .* GB for KV caches of 1,024 tokens, .*; rows of up to 64 tokens", said), said
    measured = re.search(
        r"training keeps ([\d.]+) MB of 1,024 tokens and block: rows of up to 64 tokens, [\d,]+ tokens of all rows",
        said,
    )
    assert measured, said
    assert 0.5 < float(measured[1]) < 20
