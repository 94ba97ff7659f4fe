"""A peer's KV memory: what Transformers' caches hold, in one arena; nobody gets what another is still using."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from peer.kv_cache.arena import Arena, ArenaLayer, Shape
from peer.kv_cache.edits import apply_edit, read_edits, tokens_after
from peer.kv_cache.memory import CacheMemory
from peer.kv_cache.session import Session
from peer.kv_cache.slots import Run, Slots
from peer.kv_cache.span_cache import SpanCache, fill
from peer.span.loading import load_span
from peer.span.span import Inputs, Mode, Span
from peer.start.arena_trial import arena_for
from protocol import swarm_pb2 as pb
from protocol.errors import OverQuota, PeerFull, SessionLost, TooLong
from protocol.model.checkpoint import open_checkpoint
from tests.tools.families import EXTRA_FAMILIES, FAMILIES, family_config

HEADS, SIZE, SLIDING, WINDOW = 2, 4, 1, 8
TOTAL, LONGEST = 640, 150
CONFIG = family_config("mistral")
CONFIG.layer_types = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]


# ---- slots


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 60)), max_size=60))
def test_runs_never_overlap_and_what_is_free_can_be_had(wishes: list[tuple[int, int]]) -> None:
    slots, memory = Slots(100), [-1] * 100
    runs = [Run() for _ in range(8)]
    for owner, size in wishes:
        run, before = runs[owner], runs[owner].size
        if size - before > slots.free:
            with pytest.raises(ValueError, match="are free"):
                slots.resize(run, size)
            continue
        moves, source = slots.resize(run, size)
        for move in moves:
            memory[move.target : move.target + move.size] = memory[move.source : move.source + move.size]
        assert memory[source : source + before] == [owner] * before
        memory[run.start : run.end] = [owner] * size
        for other, taken in enumerate(runs):
            assert memory[taken.start : taken.end] == [other] * taken.size
        assert slots.free == 100 - sum(taken.size for taken in runs)
    for run in runs:
        slots.release(run)
    assert slots.free == 100


def test_the_lowest_addresses_are_used_again_first() -> None:
    slots = Slots(100)
    first, second, third = Run(), Run(), Run()
    for run in (first, second, third):
        slots.resize(run, 20)
    slots.release(first)
    slots.release(second)
    slots.resize(again := Run(), 30)
    assert (again.start, third.start) == (0, 40)


def spread(sizes: list[int], gone: set[int]) -> Slots:
    """Runs of these sizes from the first slot to the last, of which some have gone again."""
    slots = Slots(sum(sizes))
    runs = [Run() for _ in sizes]
    for run, size in zip(runs, sizes, strict=True):
        slots.resize(run, size)
    for number in gone:
        slots.release(runs[number])
    return slots


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_more_is_moved_than_must_be(data: st.DataObject) -> None:
    """By trying every window of neighbours; room may be made for a new run, or for one that is there already."""
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    slots = spread(sizes, data.draw(st.sets(st.integers(0, len(sizes) - 1), max_size=6)))
    run = data.draw(st.sampled_from([Run(), *slots._runs]))
    size = run.size + data.draw(st.integers(0, slots.free))
    ends = [(0, 0), *((other.start, other.end) for other in slots._runs), (slots.total, slots.total)]
    costs = []
    for first in range(len(ends) - 1):
        for last in range(first + 1, len(ends)):
            inside = slots._runs[first : last - 1]
            others = sum(other.size for other in inside if other is not run)
            if ends[last][0] - ends[first][1] - others >= size:
                costs.append(sum(other.size for other in inside))
    moves, _ = slots.resize(run, size)
    assert sum(move.size for move in moves) <= min(costs)


def test_room_is_found_quickly_among_hundreds() -> None:
    slots = spread([20] * 600, set(range(0, 600, 2)))
    began = time.monotonic()
    slots.resize(Run(), slots.free)
    assert time.monotonic() - began < 1


# ---- sessions


def cached(rows: int, tokens: int) -> torch.Tensor:
    return torch.randn(rows, HEADS, tokens, SIZE)


class Twofold:
    """A session, and what Transformers' own layers would hold in its place."""

    def __init__(self, memory: Any, session: Session | None = None, plain: list[Any] | None = None):
        self.session = session or Session(memory, new_cache(), "client")
        self.plain = plain or [DynamicLayer(), DynamicLayer()]
        self.tokens = 0

    @property
    def rows(self) -> int:
        return self.session.rows

    def step(self, rows: int, tokens: int, edits: list[pb.CacheEdit]) -> None:
        with self.session.running():
            read = read_edits(edits)
            seen = tokens_after(read, self.session.cache.seen)
            for edit in read:
                rows = edit.rows(rows)
            self.session.prepare(read, rows, tokens, {})
            assert (self.session.rows, self.session.cache.seen) == (rows, seen)
            for sent in edits:
                self._edit(sent)
            for block, layer in zip((1, 2), self.plain, strict=True):
                new = cached(rows, tokens), cached(rows, tokens)
                ours, theirs = self.session.cache.update(*new, block), layer.update(*new)
                seen_by_it = WINDOW - 1 + tokens if block == SLIDING else seen + tokens
                assert all(torch.equal(mine, full[:, :, -seen_by_it:]) for mine, full in zip(ours, theirs, strict=True))
            self.session.cache.seen += tokens
        self.tokens = seen + tokens

    def _edit(self, edit: pb.CacheEdit) -> None:
        for layer in self.plain:
            if edit.crop:
                layer.crop(-edit.crop)
            elif edit.repeat_interleave:
                layer.batch_repeat_interleave(edit.repeat_interleave)
            elif edit.HasField("reorder"):
                layer.reorder_cache(torch.tensor(list(edit.reorder.index)))
            else:
                layer.batch_select_indices(torch.tensor(list(edit.select.index)))

    def check(self) -> None:
        """Nobody has written over it."""
        full, whole = self.session.cache.layers[2], self.plain[1]
        assert isinstance(full, ArenaLayer)
        if self.tokens:
            assert torch.equal(full.keys, whole.keys)
            assert torch.equal(full.values, whole.values)
        held = self.rows * self.tokens
        assert held <= self.session._run.size <= 1.3 * held + 16 * self.rows


def new_cache() -> SpanCache:
    return SpanCache(CONFIG, range(1, 3))


def new_memory(total: int = TOTAL, idle_timeout: float = 1e9, limit: int | None = None) -> CacheMemory:
    shape = Shape(HEADS, SIZE, torch.float32)
    arena = Arena(total, dict.fromkeys(range(5), (shape, shape)), torch.device("cpu"))
    return CacheMemory(total, LONGEST, idle_timeout, arena, limit)


def some_edits(data: st.DataObject, rows: int, tokens: int) -> list[pb.CacheEdit]:
    edits = []
    kinds = st.sampled_from(
        ["crop", "reorder", "repeat", "select"]
    )  # once each: Transformers' windows forget at a crop
    for kind in data.draw(st.lists(kinds, max_size=2, unique=True)):
        index = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
        if kind == "crop" and tokens > 1:
            edits.append(pb.CacheEdit(crop=data.draw(st.integers(1, tokens - 1))))
            tokens -= edits[-1].crop
        elif kind == "reorder":
            edits.append(pb.CacheEdit(reorder=pb.IndexList(index=index)))
        elif kind == "repeat" and rows < 3:
            edits.append(pb.CacheEdit(repeat_interleave=2))
            rows *= 2
        elif kind == "select":
            edits.append(pb.CacheEdit(select=pb.IndexList(index=index[: data.draw(st.integers(1, rows))])))
            rows = len(edits[-1].select.index)
    return edits


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sessions_hold_what_transformers_would_hold(data: st.DataObject) -> None:
    """Random sessions that open, grow, are cropped, edited, copied and closed: no overlap, no leak, bounded waste."""
    memory = new_memory()
    sessions: list[Twofold] = []
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.sampled_from(["open", "step", "step", "long", "copy", "close"]))
        one = sessions[data.draw(st.integers(0, len(sessions) - 1))] if sessions else None
        try:
            if kind == "open" or one is None:
                sessions.append(Twofold(memory))
                sessions[-1].step(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 60)), [])
            elif kind in ("step", "long"):
                edits = some_edits(data, one.rows, one.tokens)
                one.step(one.rows, 1 if kind == "step" else data.draw(st.integers(2, 40)), edits)
            elif kind == "copy":
                twin = one.session.twin()
                one.session.copy_to(twin)
                other = Twofold(memory, twin, [_copy(layer) for layer in one.plain])
                other.tokens = one.tokens
                sessions.append(other)
            else:
                sessions.remove(one)
                one.session.close()
        except (PeerFull, TooLong):
            failed = one if one is not None and kind != "open" else sessions[-1]
            if failed in sessions and kind != "copy":
                sessions.remove(failed)
                failed.session.close()
        for session in sessions:
            session.check()
        assert memory.free_tokens == TOTAL - sum(session.session._run.size for session in sessions)
    for session in sessions:
        session.session.close()
    assert memory.free_tokens == TOTAL


def _copy(layer: Any) -> Any:
    twin = type(layer).__new__(type(layer))
    twin.__dict__.update(layer.__dict__)
    return twin


def test_a_full_memory_can_be_used_to_the_last_slot() -> None:
    """Holes between sessions do not stand in the way: they are slid together."""
    memory = new_memory(total=160)
    kept, gone = [], []
    for number in range(10):
        one = Twofold(memory)
        one.step(1, 12, [])  # a page of 16 each
        (gone if number % 2 else kept).append(one)
    assert memory.free_tokens == 0
    with pytest.raises(PeerFull, match="0 of 160 tokens free, 1 more") as refused:
        Twofold(memory).step(1, 1, [])
    assert refused.value.retry_after > 0
    for one in gone:
        one.session.close()
    large = Twofold(memory)
    large.step(1, 80, [])
    assert memory.free_tokens == 0
    for one in [*kept, large]:
        one.check()
    large.session.close()
    kept[2].step(1, 84, [])  # one in the middle grows over all of its neighbours' holes
    for one in kept:
        one.check()


def test_a_quota_is_kept_and_given_back() -> None:
    memory = new_memory(limit=70)
    one, other, others = Twofold(memory), Twofold(memory), Twofold(memory, Session(memory, new_cache(), "another"))
    one.step(1, 40, [])
    with pytest.raises(OverQuota, match="may hold 70 tokens in this peer's KV caches, and this one would hold 104"):
        other.step(1, 40, [])
    others.step(1, 60, [])
    one.session.close()
    one.session.close()
    other.step(1, 65, [])
    assert (memory.held("client"), memory.held("another")) == (other.session._run.size, others.session._run.size)
    for each in (other, others):
        each.session.close()
    assert memory.held("client") == memory.held("another") == 0
    assert memory.free_tokens == TOTAL


def test_idle_sessions_give_way_to_new_ones() -> None:
    memory = new_memory(total=64, idle_timeout=0.0)
    idle, busy = Twofold(memory), Twofold(memory)
    for one in (idle, busy):
        memory.watch(one.session)
        one.step(1, 20, [])
    with idle.session.in_use():
        pass
    Twofold(memory).step(1, 30, [])
    assert (idle.session.lost, busy.session.lost) == (True, False)
    busy.check()
    with pytest.raises(SessionLost):
        idle.step(1, 1, [])


# ---- threads


def test_a_session_that_ends_during_its_step_keeps_its_memory_until_the_step_ends() -> None:
    """The event loop ends it while the compute thread writes: nobody may be given the slots that it writes to."""
    memory = new_memory(total=64)
    dying, heir = Twofold(memory), Twofold(memory)
    dying.step(1, 20, [])
    with dying.session.running():
        dying.session.reserve(1, 60)
        ended = threading.Thread(target=dying.session.close)
        ended.start()
        ended.join(5)
        assert not ended.is_alive()  # the event loop does not wait
        with pytest.raises(PeerFull):
            heir.step(1, 40, [])
        for block in (1, 2):
            dying.session.cache.update(cached(1, 40), cached(1, 40), block)
    heir.step(1, 60, [])
    heir.check()
    assert memory.free_tokens == 64 - heir.session._run.size


def test_a_step_that_comes_after_the_end_reserves_nothing() -> None:
    memory = new_memory()
    one = Twofold(memory)
    one.step(1, 20, [])
    twin = one.session.twin()
    twin.close()
    with pytest.raises(SessionLost):
        one.session.copy_to(twin)
    one.session.close()
    with pytest.raises(SessionLost):
        one.step(1, 1, [])
    assert memory.free_tokens == TOTAL


def test_a_step_that_fails_ends_its_session() -> None:
    memory = new_memory()
    one = Twofold(memory)
    one.step(1, 20, [])

    def fail() -> None:
        with one.session.running(), one.session.changing():
            one.session.reserve(1, 100)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (one.session.lost, memory.free_tokens) == (True, TOTAL)


# ---- memory


def test_only_what_is_used_takes_memory() -> None:
    process, mib = psutil.Process(), 2**20
    shape = Shape(8, 64, torch.float32)
    before = process.memory_info().rss
    arena = Arena(2_000_000, {0: (shape, shape)}, torch.device("cpu"))  # 8 GB
    memory = CacheMemory(2_000_000, 2_000_000, 1e9, arena)
    assert process.memory_info().rss - before < 4 * mib
    session = Session(memory, SpanCache(family_config("llama"), range(1)))
    session.reserve(1, 20_000)
    assert process.memory_info().rss - before < 4 * mib
    session.cache.update(*(torch.ones(8, 16_384, 64).expand(1, -1, -1, -1) for _ in range(2)), 0)
    assert 60 * mib < process.memory_info().rss - before < 75 * mib
    session.close()
    assert process.memory_info().rss - before < 8 * mib


# ---- exactness


def _edits(rows: int) -> list[pb.CacheEdit]:
    return [
        pb.CacheEdit(crop=2),
        pb.CacheEdit(repeat_interleave=2),
        pb.CacheEdit(reorder=pb.IndexList(index=[*range(1, 2 * rows), 0])),
        pb.CacheEdit(select=pb.IndexList(index=[*range(0, 2 * rows, 2)])),
    ]


def _play(span: Span, memory: CacheMemory | None, is_croppable: bool) -> tuple[list[torch.Tensor], SpanCache]:
    """The outputs of a prefill, steps with edits between them and a long second turn; in the arena, or without."""
    outputs, generator = [], torch.Generator().manual_seed(0)
    for rows in (1, 2):
        cache = SpanCache(span.model.config, span.blocks)
        cache.activate_past_recording()
        session = Session(memory, cache) if memory else None
        for number, tokens in enumerate((21, 1, 14, 1) if rows == 2 else (13, 1)):
            if session:
                session.reserve(2 * rows, cache.seen + tokens)
            for edit in read_edits(_edits(rows)) if number == 1 and is_croppable else []:
                apply_edit(cache, edit)
            hidden = torch.randn(rows, tokens, span.hidden_size, generator=generator).to(span.dtype)
            mask = torch.ones(rows, cache.seen + tokens, dtype=torch.long)
            mask[-1, : 3 * (rows - 1)] = 0
            outputs.append(span.run(Inputs(hidden, mask), Mode(span.blocks), cache))
            cache.seen += tokens
    return outputs, cache


@pytest.mark.parametrize("family", [*FAMILIES, *EXTRA_FAMILIES])
@torch.no_grad()
def test_every_family_computes_the_same_in_the_arena(models: Callable[[str], Path], family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        span = load_span(open_checkpoint(str(models(family))), 0, 5, dtype=dtype)
        is_croppable = family != "qwen3_next"
        memory = CacheMemory(1000, 500, 1e9, arena_for(span, 1000))
        expected, plain = _play(span, None, is_croppable)
        found, ours = _play(span, memory, is_croppable)
        for theirs, mine in zip(expected, found, strict=True):
            assert torch.equal(theirs, mine)
        attention = [i for i in range(5) if not plain.is_linear[i]]
        assert all(isinstance(ours.layers[i], ArenaLayer) for i in attention)
        assert [layer.get_seq_length() for layer in ours.arena_layers()] == [plain.get_seq_length(4)] * len(attention)


@torch.no_grad()
def test_what_the_arena_cannot_hold_is_kept_by_transformers(models: Callable[[str], Path]) -> None:
    """Autocast caches values in another dtype than the span's; a prefix comes before, a plain step after."""
    span = load_span(open_checkpoint(str(models("llama"))), 0, 5)
    outputs = []
    for memory in (None, CacheMemory(1000, 500, 1e9, arena_for(span, 1000))):
        torch.manual_seed(0)
        for prefix_tokens in (0, 3):
            cache = SpanCache(span.model.config, span.blocks)
            if memory:
                Session(memory, cache).reserve(1, 40)
            prefix = {i: (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)) for i in span.blocks}
            fill(cache, prefix if prefix_tokens else {})
            for autocast in (torch.bfloat16, None, torch.bfloat16):
                hidden = torch.randn(1, 5, span.hidden_size)
                outputs.append(span.run(Inputs(hidden), Mode(span.blocks, autocast=autocast), cache))
                cache.seen += 5
    half = len(outputs) // 2
    assert all(map(torch.equal, outputs[:half], outputs[half:]))


@torch.no_grad()
def test_a_span_that_computes_something_else_with_views_keeps_transformers_layers(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    span = load_span(open_checkpoint(str(models("llama"))), 0, 5)
    assert set(arena_for(span, 10)._stores) == set(range(5))
    update = ArenaLayer.update

    def rounded(layer: ArenaLayer, *args: Any) -> Any:
        keys, values = update(layer, *args)
        return keys * (1 + 1e-6), values

    monkeypatch.setattr(ArenaLayer, "update", rounded)
    assert arena_for(span, 10)._stores == {}
    monkeypatch.setattr(ArenaLayer, "update", lambda *args: 1 / 0)
    assert arena_for(span, 10)._stores == {}
