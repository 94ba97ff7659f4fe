"""Training calls that run together: each gets what it would get alone, keeps its own memory, and fails by itself."""

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from peer.adapters.lora import Delta
from peer.adapters.store import AdapterStore, StoredAdapter
from peer.span.span import Inputs, Mode, Span
from peer.training.call import TrainingCall
from peer.training.joined.products import Products
from peer.training.joined.side_by_side import Place, meet, run_together
from peer.training.joined.together import Together
from peer.training.runner import Task, TrainingRunner
from peer.training.trainer import Trainer
from protocol.errors import BadRequest, UnknownCall
from tests.tools.lora import put_lora
from tests.tools.spans import END, START, assert_same, states

CLIENTS = ("ann", "bob", "cid", "dan")


def grad_of(result: torch.Tensor, number: int) -> torch.Tensor:
    """What client `number` sends for a forward's result."""
    return states(*result.shape[:2], 50 + number)


class Desk:
    """A span, and training calls of four clients on it: of different lengths, one padded, one without an adapter."""

    def __init__(self, span: Span, max_kept: int = 10**9):
        self.span = span
        self.store = AdapterStore(span, 10**8, 64, 10**8)
        self.trainer = Trainer(span, self.store, max_kept, 10**10)
        self.runner = TrainingRunner(self.trainer, Together(span, 32))

    def put(self, targets: Sequence[str], rank: int, seed: int, **options: Any) -> StoredAdapter:
        """Of every second seed the first tensor is frozen."""
        return put_lora(self.store, self.span, targets, rank, seed, frozen=seed % 2, **options)

    def call(self, rows: int, tokens: int, seed: int, bundle: StoredAdapter | None = None, **mode: Any) -> TrainingCall:
        mask = torch.ones(rows, tokens, dtype=torch.long)
        mask[0, : tokens // 3] = 0
        options = {"training": True} | mode
        return TrainingCall(Inputs(states(rows, tokens, seed), mask), Mode(self.span.blocks, **options), bundle, {})

    def calls(self, *bundles: StoredAdapter | None) -> list[TrainingCall]:
        sizes = ((1, 11), (2, 7), (1, 2), (1, 17))
        return [self.call(*size, i, bundle) for i, (size, bundle) in enumerate(zip(sizes, bundles, strict=True))]

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        """As the scheduler would have them run."""
        assert tasks[0].group is not None
        assert len({task.group for task in tasks}) == 1
        return self.runner.run(tasks)

    def forward(self, calls: Sequence[TrainingCall]) -> list[Any]:
        return self.run([self.runner.forward(call, CLIENTS[i], keep=True) for i, call in enumerate(calls)])

    def backward(self, answers: Sequence[Any], who: Sequence[int] = range(4)) -> list[Any]:
        """For the answers to these clients' forwards."""
        given = [(i, hidden, call_id) for i, (hidden, call_id) in zip(who, answers, strict=False)]
        return self.run([self.runner.backward_kept(name, CLIENTS[i], grad_of(hidden, i)) for i, hidden, name in given])

    def alone(self, calls: Sequence[TrainingCall]) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """Results and gradients one by one, in ways that never meet."""
        results, gradients = [], []
        for i, call in enumerate(calls):
            hidden, call_id = self.trainer.forward(call, "me", keep=True)
            results.append(hidden)
            gradients.append(self.trainer.backward_kept(call_id, "me", grad_of(hidden, i)))
        return results, gradients


TARGETS = {
    "llama": ("1.self_attn.q_proj", "2.mlp.down_proj", "3.self_attn.v_proj"),
    "gpt2": ("1.attn.c_attn", "2.mlp.c_fc", "3.attn.c_attn"),
    "bloom": ("1.self_attention.query_key_value", "2.mlp.dense_h_to_4h", "3.self_attention.dense"),
    "qwen3_moe": ("1.self_attn.q_proj", "2.self_attn.o_proj", "3.self_attn.v_proj"),
}


@pytest.fixture
def desk(spans: Callable[..., Span]) -> Desk:
    return Desk(spans("llama"))


def loras(desk: Desk, family: str = "llama") -> list[StoredAdapter | None]:
    """Of other targets, ranks and scalings; the last has none."""
    first, second, third = TARGETS[family]
    kinds = (((first, second), 4), ((first, third), 4), ((second,), 2))
    return [*(desk.put(targets, rank, seed) for seed, (targets, rank) in enumerate(kinds)), None]


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(
    ("family", "quantization"),
    [("llama", "none"), ("gpt2", "none"), ("bloom", "none"), ("qwen3_moe", "none"), ("llama", "nf4")],
)
def test_together_as_alone(spans: Callable[..., Span], family: str, quantization: str, keeps: bool) -> None:
    """Forward, then backward from what was kept, or by computing the forward again."""
    desk = Desk(spans(family, quantization=quantization))
    calls = desk.calls(*loras(desk, family))
    results, gradients = desk.alone(calls)
    grads = [grad_of(result, i) for i, result in enumerate(results)]
    runner = desk.runner
    if keeps:
        answers = desk.forward(calls)
        assert_same([hidden for hidden, _ in answers], results)
        assert_same(desk.backward(answers), gradients)
    else:
        answers = desk.run([runner.forward(call, "me", keep=False) for call in calls])
        assert_same([hidden for hidden, _ in answers], results)
        again = [runner.backward(call, grad) for call, grad in zip(calls, grads, strict=True)]
        assert_same(desk.run(again), gradients)
    assert (runner.counts.items, runner.counts.passes) == (8, 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_a_call_by_itself_is_what_it_always_was(spans: Callable[..., Span], family: str) -> None:
    """Bit by bit, though its graph is made so that its backward can meet others'."""
    desk = Desk(spans(family))
    for call in desk.calls(*(loras(desk, family) if family in TARGETS else [None] * 4)):
        (expected,), (gradients,) = desk.alone([call])
        ((hidden, call_id),) = desk.forward([call])
        assert desk.trainer.kept.meets(call_id)
        (found,) = desk.backward([(hidden, call_id)])
        assert torch.equal(hidden, expected)
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradients[name]) for name in found)


def products_alive() -> int:
    """How many products of forwards a backward could still pass."""
    return sum(type(thing).__name__ == "_ProductBackward" for thing in gc.get_objects())


def test_companions_that_never_come(desk: Desk) -> None:
    """A call's backward needs none of theirs, and each call's memory goes by itself."""
    before = products_alive()
    calls = desk.calls(*loras(desk))
    _, gradients = desk.alone(calls)
    answers = desk.forward(calls)
    each = (products_alive() - before) // 4
    assert each >= 7 * (END - START)
    assert_same(desk.backward(answers[:1]), gradients[:1])
    assert products_alive() - before == 3 * each
    desk.runner.forget("bob")
    assert products_alive() - before == 2 * each
    again = desk.forward(calls[:1])  # who was not there before
    found = desk.backward([*again, *answers[2:]], (0, 2, 3))
    assert_same(found, [gradients[0], *gradients[2:]])
    assert products_alive() == before


def test_each_keeps_and_is_counted_by_itself(spans: Callable[..., Span]) -> None:
    """Memory for one call and a half: of two that were joined, the older gives way, as it would have alone."""
    span = spans("llama")
    call = Desk(span).call(1, 16, 1)
    desk = Desk(span, Desk(span).trainer.footprint.of(call) * 3 // 2)
    calls = [call, desk.call(1, 16, 2)]
    (_, gradients) = desk.alone(calls)
    answers = desk.forward(calls)
    assert not desk.trainer.kept.meets(answers[0][1])
    assert_same(desk.backward(answers[1:], (1,)), gradients[1:])


# ---- failures


def test_what_is_wrong_with_one_call_is_not_with_others(desk: Desk) -> None:
    """NaN and infinity; a mask that fits nothing; a gradient of another shape; a call that is not kept."""
    bundles = loras(desk)
    calls = desk.calls(*bundles)
    results, gradients = desk.alone(calls)
    bad = desk.call(1, 11, 0, bundles[0])
    bad.inputs.hidden[0, 3:5] = torch.tensor([torch.nan, torch.inf])[:, None]
    answers = desk.forward([bad, *calls[1:]])
    assert answers[0][0].isnan().any()
    assert_same([hidden for hidden, _ in answers[1:]], results[1:])
    assert_same(desk.backward(answers)[1:], gradients[1:])

    bad = TrainingCall(Inputs(calls[2].inputs.hidden, torch.ones(1, 1, 1, 99)), calls[2].mode, bundles[2], {})
    first, second, failed, last = desk.forward([*calls[:2], bad, calls[3]])
    assert isinstance(failed, Exception)
    good = [first, second, last]
    assert_same([hidden for hidden, _ in good], [*results[:2], results[3]])

    tasks = [
        desk.runner.backward_kept(good[i][1], owner, grad_of(good[shape][0], number))
        for i, owner, shape, number in ((0, "ann", 0, 0), (1, "bob", 0, 1), (1, "ann", 1, 1), (2, "dan", 2, 3))
    ]
    found = desk.run(tasks)
    assert_same([found[0], found[3]], [gradients[0], gradients[3]])
    assert [type(one) for one in found[1:3]] == [BadRequest, UnknownCall]


@pytest.mark.parametrize("where", ["one call", "the joined product"])
def test_memory_for_all_is_not_to_be_had(desk: Desk, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """It may be for one by one."""
    calls = desk.calls(*loras(desk))
    results, gradients = desk.alone(calls)
    of, cat, failed, compute_thread = Delta.of, torch.cat, list[int](), threading.get_ident()

    def fail(delta: Delta, inputs: torch.Tensor) -> torch.Tensor:
        if threading.get_ident() != compute_thread and inputs.shape[:2] == (2, 7):
            failed.append(1)
            raise torch.OutOfMemoryError("for so many")
        return of(delta, inputs)

    def fail_for_all(tensors: Any, *rest: Any, **options: Any) -> torch.Tensor:
        if threading.get_ident() == compute_thread:
            failed.append(len(tensors))
            raise torch.OutOfMemoryError("for all of them")
        return cat(tensors, *rest, **options)

    with monkeypatch.context() as patch:
        if where == "one call":
            patch.setattr(Delta, "of", fail)
        else:
            patch.setattr(torch, "cat", fail_for_all)
        answers = desk.forward(calls)
        found = desk.backward(answers)
    assert failed == [1] if where == "one call" else failed == [4] * 2 * 7 * (END - START)
    assert_same([hidden for hidden, _ in answers], results)
    assert_same(found, gradients)


def test_what_does_not_fit_runs_alone(desk: Desk) -> None:
    """Block by block; it does the others no harm."""
    calls = desk.calls(*loras(desk))
    results, gradients = desk.alone(calls)
    small = Desk(desk.span, max(map(desk.trainer.footprint.of_checkpoints, calls)) * 11 // 10)
    fits = [desk.trainer.footprint.of(call) <= small.trainer.kept.max_bytes for call in calls]
    assert set(fits) == {True, False}
    pairs = [(call, grad_of(result, i)) for i, (call, result) in enumerate(zip(calls, results, strict=True))]
    assert_same(small.run([small.runner.backward(call, grad) for call, grad in pairs]), gradients)


def test_who_runs_alone(desk: Desk, spans: Callable[..., Span]) -> None:
    """Dropout, autocast, prefixes, adapters other than LoRA, large calls, and layers that look at all tokens."""
    q = [TARGETS["llama"][0]]
    lora, dora, drops = desk.put(q, 4, 1), desk.put(q, 4, 2, use_dora=True), desk.put(q, 4, 3, lora_dropout=0.1)

    def group(call: TrainingCall) -> Any:
        return desk.runner.forward(call, "me", keep=True).group

    assert group(desk.call(1, 4, 0)) == group(desk.call(2, 9, 0, lora)) is not None
    assert group(desk.call(1, 4, 0, training=False)) not in (None, group(desk.call(1, 4, 0)))
    assert group(desk.call(1, 4, 0, drops, training=False)) is not None
    for bundle, mode in ((dora, {}), (drops, {}), (lora, {"dropout_seed": 1}), (lora, {"autocast": torch.bfloat16})):
        assert group(desk.call(1, 4, 0, bundle, **mode)) is None
    assert group(desk.call(1, 33, 0)) is None
    inputs = desk.call(1, 4, 0).inputs
    assert (
        group(TrainingCall(inputs, Mode(desk.span.blocks), None, {START: (states(1, 4, 0), states(1, 4, 0))})) is None
    )
    _, call_id = desk.trainer.forward(desk.call(1, 4, 0), "me", keep=True)
    assert desk.runner.backward_kept(call_id, "me", states(1, 4, 0)).group is None  # its graph has no meeting places
    rough = Desk(spans("llama", quantization="int8"))
    assert rough.runner.forward(rough.call(1, 4, 0), "me", keep=True).group is None


def test_functions_that_take_other_ways() -> None:
    """Who diverges from the others goes on alone until they are at one place again."""
    met = list[tuple[int, int]]()

    def note(number: int, items: Sequence[int]) -> Sequence[int]:
        met.append((number, len(items)))
        return items

    places = [Place.forward(number, functools.partial(note, number)) for number in range(5)]

    def visit(*numbers: int) -> int:
        return sum(meet(places[number], number) for number in numbers)

    ways = [(0, 1, 2, 4), (0, 3, 4), (0, 4), (0,)]
    assert run_together([functools.partial(visit, *way) for way in ways]) == [sum(way) for way in ways]
    assert met == [(0, 4), (1, 1), (2, 1), (3, 1), (4, 3)]


def test_what_failed_holds_no_memory() -> None:
    """Not even until the garbage is collected: its activations would be in the way of the next attempt."""
    held = list[weakref.ref[torch.Tensor]]()

    def refuse(items: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        raise torch.OutOfMemoryError

    def visit() -> None:
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        meet(Place.forward(0, refuse), activations)

    gc.disable()
    try:
        outcomes = run_together([visit, visit])
        assert [type(outcome) for outcome in outcomes] == [torch.OutOfMemoryError] * 2
        del outcomes
        assert [tensor() for tensor in held] == [None, None]
    finally:
        gc.enable()


def test_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have begun are not left waiting for ever."""
    started = list[threading.Thread]()
    start = threading.Thread.start

    def start_two(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_two)
        with pytest.raises(RuntimeError, match="new thread"):
            run_together([int, int, int])
    for thread in started:
        thread.join(5)
        assert not thread.is_alive()


def test_products_leave_no_trace(desk: Desk) -> None:
    """What runs after calls that met is the model's own code again."""
    desk.forward(desk.calls(*[None] * 4))
    assert not any("forward" in vars(module) for module in desk.span.model.modules())
    assert Products(desk.span).have(TARGETS["llama"])
