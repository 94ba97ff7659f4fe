"""Several sessions' steps in one trunk call give what each gives alone; what is wrong with one is its own affair."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from peer.adapters.peft_trees import share_linears
from peer.adapters.store import StoredAdapter
from peer.generation.joined.lockstep import Lockstep
from peer.generation.joined.packing import Packer
from peer.generation.steps import Step
from peer.kv_cache.span_cache import SpanCache
from peer.span.block_types import blocks_of_each_type
from peer.span.span import Inputs, Mode, Span, find_module
from peer.start.joining_trial import find_joiner
from protocol import swarm_pb2 as pb
from protocol.errors import BadRequest, PeerFull, SessionLost, TooLong
from tests.tools.desk import Desk, play
from tests.tools.families import EXTRA_FAMILIES, FAMILIES, MULTIMODAL_FAMILIES
from tests.tools.spans import END, START, assert_same, states

IN_LOCKSTEP = {"bloom", "falcon", "falcon_alibi", "deepseek_v3", "llama4", "llama4_full", "qwen3_next"}
"""Families that cannot be packed."""


@pytest.fixture(scope="module")
def llama(spans: Callable[..., Span]) -> Span:
    return spans("llama")


@pytest.mark.parametrize("keep_past", [False, True])
@pytest.mark.parametrize("family", FAMILIES + EXTRA_FAMILIES + MULTIMODAL_FAMILIES)
def test_together_as_alone(spans: Callable[..., Span], family: str, keep_past: bool) -> None:
    desk = Desk(spans(family))
    alone = list(play(desk, desk.each, keep_past))
    calls = desk.runner.counts.passes
    assert calls == len(alone) == 17
    assert_same(list(play(desk, desk.run, keep_past)), alone)
    assert desk.runner.counts.passes == calls + 5


@pytest.mark.parametrize("family", FAMILIES + EXTRA_FAMILIES + MULTIMODAL_FAMILIES)
def test_a_span_finds_out_whether_it_can(spans: Callable[..., Span], family: str) -> None:
    span = spans(family)
    assert type(find_joiner(span)) is (Lockstep if family in IN_LOCKSTEP else Packer)
    assert span.model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"quantization": "nf4"}, {"quantization": "int8"}])
@pytest.mark.parametrize(("family", "way"), [("llama", Packer), ("bloom", Lockstep)])
def test_a_rough_span_can_too(spans: Callable[..., Span], options: dict[str, Any], family: str, way: type) -> None:
    assert type(find_joiner(spans(family, **options))) is way


def test_positions_that_look_at_the_longest_sequence(llama: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short check would not show that they depend on who else is in the call."""
    rotary: Any = next(module for module in llama.model.modules() if hasattr(module, "rope_type"))
    monkeypatch.setattr(rotary, "rope_type", "dynamic")
    assert type(find_joiner(llama)) is Lockstep


def test_a_step_by_itself_is_what_the_trunk_computes(llama: Span) -> None:
    desk = Desk(llama)
    talk, cache = desk.open(), SpanCache(llama.model.config, llama.blocks)
    for tokens in (7, 1, 1):
        step = desk.step(talk, states(1, tokens, tokens))
        (ours,) = desk.run(step)
        with torch.no_grad():
            theirs = llama.run(step.inputs, step.mode, cache)
        assert torch.equal(ours, theirs)


def test_prefix_tuning(llama: Span) -> None:
    desk = Desk(llama)
    heads, size = llama.kv_shapes[START][0].sizes
    shape = (2, heads, 4, size)
    prefix: dict[str, Any] = {
        f"prefix.{block}.{kind}": torch.ones(shape) / 3 for block in llama.blocks for kind in ("key", "value")
    }

    def steps() -> tuple[Step, Step]:
        return desk.step(desk.open(), states(2, 5, 1), **prefix), desk.step(desk.open(), states(1, 3, 2))

    assert_same(desk.run(*steps()), desk.each(*steps()))


# ---- adapters


NAMES: dict[str, dict[str, str]] = {
    "llama": {},
    "gemma3_full": {},
    "gpt2": {"self_attn.q_proj": "attn.c_attn", "mlp.down_proj": "mlp.c_fc"},
    "bloom": {"self_attn.q_proj": "self_attention.query_key_value", "mlp.down_proj": "mlp.dense_4h_to_h"},
    # The first runs on the whole context of each session, not on the new tokens.
    "deepseek_v3": {"self_attn.q_proj": "self_attn.kv_b_proj", "mlp.down_proj": "self_attn.o_proj"},
}
"""What they are called in other families than Llama."""

Q, DOWN = ["1.self_attn.q_proj", "3.self_attn.q_proj"], ["2.mlp.down_proj"]


def renamed(family: str, targets: Sequence[str]) -> list[str]:
    parts = [target.partition(".") for target in targets]
    return [f"{block}.{NAMES[family].get(path, path)}" for block, _, path in parts]


def compare_adapters(span: Span, kinds: list[tuple[Any, int]], tokens: Sequence[int]) -> None:
    """Over and over, as the copies for grouped products are made when a set of adapters comes back."""
    desk = Desk(span)
    bundles = [None, *(desk.put(targets, rank, seed) for seed, (targets, rank) in enumerate(kinds))]
    results = []
    for run in (desk.run, desk.each):
        talks = [desk.open() for _ in bundles]
        for turn in range(4):
            steps = [
                desk.step(talk, states(1, count, turn), bundle=bundle)
                for talk, bundle, count in zip(talks, bundles, tokens, strict=True)
            ]
            results.append(run(*steps))
    for ours, theirs in zip(results[:4], results[4:], strict=True):
        assert_same(ours, theirs)
    assert not any(torch.allclose(results[3][0], other[:, :1], atol=1e-3) for other in results[3][1:])
    assert desk.runner.counts.passes == 4 + 4 * 4


@pytest.mark.parametrize("tokens", [(1, 1, 1, 1), (4, 1, 3, 1)])
@pytest.mark.parametrize("kinds", [[(Q, 4)] * 3, [(Q, 4), (Q, 2), (DOWN, 4)], [(Q + DOWN, 2), (Q, 2), (Q, 2)]])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_full"])
def test_lora_of_different_clients(
    spans: Callable[..., Span], family: str, kinds: list[tuple[Any, int]], tokens: Sequence[int]
) -> None:
    compare_adapters(spans(family), [(renamed(family, targets), rank) for targets, rank in kinds], tokens)


def test_a_tree_calls_the_attention_function_that_its_span_calls(spans: Callable[..., Span]) -> None:
    """A model that sees has several configurations, each of which names one."""
    model = spans("gemma3_full").model
    tree = share_linears(model)
    configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    assert len({id(config) for config in configs.values()}) > 1
    assert all(tree.get_submodule(name).config is config for name, config in configs.items())


@pytest.mark.parametrize("family", ["bloom", "deepseek_v3"])
def test_lora_in_lockstep(spans: Callable[..., Span], family: str) -> None:
    q, both = renamed(family, Q), renamed(family, Q + DOWN)
    compare_adapters(spans(family), [(q, 4), (q, 4), (q, 4)], (1, 1, 1, 1))
    compare_adapters(spans(family), [(q, 4), (both, 2), (q, 2)], (4, 1, 3, 1))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_other_adapters_join_only_their_own_kind(spans: Callable[..., Span], family: str) -> None:
    desk, q = Desk(spans(family)), renamed(family, Q)
    dora, lora = desk.put(q, 4, 1, use_dora=True), desk.put(q, 4, 2)

    def group(bundle: StoredAdapter | None, **mode: Any) -> Any:
        step = desk.step(desk.open(), states(1, 1, 0), bundle=bundle)
        step.mode = Mode(desk.span.blocks, **mode)
        return desk.runner.group(step)

    assert group(None) == group(lora) != group(dora) != group(desk.put(q, 4, 3, use_dora=True))
    assert group(None, training=True) is group(None, autocast=torch.bfloat16) is group(None, dropout_seed=1) is None

    def steps() -> list[Step]:
        return [desk.step(desk.open(), states(1, 3, seed), bundle=dora) for seed in (1, 2)]

    assert_same(desk.run(*steps()), desk.each(*steps()))


# ---- failures


def test_a_bad_step_among_good_ones(llama: Span) -> None:
    desk = Desk(llama)
    talks = [desk.open() for _ in range(4)]
    first = [desk.step(talk, states(1, 4, i)) for i, talk in enumerate(talks)]
    desk.run(*first)
    second = [desk.step(talk, states(1, 1, i)) for i, talk in enumerate(talks)]
    with pytest.raises(BadRequest, match="attention_mask is"):  # before its turn
        desk.step(talks[1], states(1, 1, 1), attention_mask=torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(TooLong):
        desk.step(talks[2], states(1, 300, 1))
    second[1] = desk.step(talks[1], states(2, 1, 1))
    repeat, crop = pb.CacheEdit(repeat_interleave=2000), pb.CacheEdit(crop=3)
    second[2] = desk.step(talks[2], states(2000, 200, 1), crop, repeat)
    outcomes = desk.run(*second)
    assert [type(outcome) for outcome in outcomes[1:3]] == [BadRequest, PeerFull]
    assert not any(talk.session.lost for talk in talks)  # nothing of theirs was changed
    again = [desk.step(talk, states(1, 1, 9)) for talk in talks]
    alone = [desk.open() for _ in talks]
    for number, talk in enumerate(alone):
        desk.run(desk.step(talk, states(1, 4, number)))
        if number in (0, 3):
            desk.run(desk.step(talk, states(1, 1, number)))
    assert_same(desk.run(*again), desk.each(*(desk.step(talk, states(1, 1, 9)) for talk in alone)))


@pytest.mark.parametrize("block", [START, END - 1])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_session_that_fails_or_ends_in_the_middle(
    spans: Callable[..., Span], monkeypatch: pytest.MonkeyPatch, family: str, block: int
) -> None:
    """Its client has gone, or its memory is not to be had: the others' numbers are as ever."""
    desk = Desk(spans(family))
    talks = [desk.open() for _ in range(4)]
    update = SpanCache.update

    def fail(cache: SpanCache, key: Any, value: Any, layer: int, **options: Any) -> Any:
        if layer == block and cache is talks[0].session.cache:
            raise MemoryError("no room")
        if layer == block and cache is talks[2].session.cache:
            talks[2].session.close()
        return update(cache, key, value, layer, **options)

    steps = [desk.step(talk, states(1, 3, i)) for i, talk in enumerate(talks)]
    with monkeypatch.context() as patch:
        patch.setattr(SpanCache, "update", fail)
        outcomes = desk.run(*steps)
    assert isinstance(outcomes[0], MemoryError)
    assert isinstance(outcomes[2], torch.Tensor)  # its memory goes when the step has ended
    assert [talk.session.lost for talk in talks] == [True, False, True, False]
    alone = [desk.open() for _ in range(2)]
    first = [desk.step(talk, states(1, 3, seed)) for talk, seed in zip(alone, (1, 3), strict=True)]
    assert_same([outcomes[1], outcomes[3]], desk.each(*first))
    steps = [desk.step(talks[i], states(1, 1, 5)) for i in (1, 3)]
    assert_same(desk.run(*steps), desk.each(*(desk.step(talk, states(1, 1, 5)) for talk in alone)))


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("has_begun", [False, True])
def test_the_call_itself_fails(
    llama: Span, monkeypatch: pytest.MonkeyPatch, has_begun: bool, error: type[Exception]
) -> None:
    """Each is run alone when no cache has been touched, or when there was no memory for all at once; else the clients
    are told to send their tokens again."""
    desk = Desk(llama)
    run = Span.run

    def fail(span: Span, inputs: Any, *rest: Any) -> torch.Tensor:
        if inputs.hidden.shape[1] == 6:
            if has_begun:
                run(span, inputs, *rest)
            raise error("for all of them")
        return run(span, inputs, *rest)

    monkeypatch.setattr(Span, "run", fail)
    talks = [desk.open() for _ in range(2)]
    outcomes = desk.run(*(desk.step(talk, states(1, 3, i)) for i, talk in enumerate(talks)))
    monkeypatch.undo()
    if has_begun and error is RuntimeError:
        assert all(isinstance(outcome, SessionLost) for outcome in outcomes)
        assert all(talk.session.lost for talk in talks)
        (outcome,) = desk.run(desk.step(desk.open(), states(1, 3, 0)))
        assert isinstance(outcome, torch.Tensor)
    else:
        assert_same(outcomes, desk.each(*(desk.step(desk.open(), states(1, 3, i)) for i in range(2))))


def test_a_joined_call_of_one(llama: Span, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled step goes alone as a joined call does; what it fails of is told as it is."""
    desk = Desk(llama, Packer(llama))
    with monkeypatch.context() as patch:
        patch.setattr(type(find_module(llama.where.of(llama.model), f"{END - 1}.mlp")), "forward", fail)
        (outcome,) = desk.run(desk.step(desk.open(), states(1, 3, 0)))
    assert isinstance(outcome, RuntimeError)
    assert not isinstance(outcome, SessionLost)


def test_one_block_of_each_kind_whatever_ran_last(spans: Callable[..., Span]) -> None:
    span = spans("gpt_oss")
    expected = blocks_of_each_type(span)
    span.run(Inputs(states(1, 1, 0)), Mode(span.blocks[-1:]))
    assert blocks_of_each_type(span) == expected
    assert len(expected) == 2


def test_a_module_fails_for_all_in_lockstep(spans: Callable[..., Span], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of the call: neither in the model nor of the sessions' ways through it."""
    span = spans("bloom")
    desk, block = Desk(span), span.where.of(span.model)._modules[str(END - 1)]
    with monkeypatch.context() as patch:
        patch.setattr(type(block.mlp), "forward", fail)
        outcomes = desk.run(*(desk.step(desk.open(), states(1, 3, i)) for i in range(3)))
    assert all(isinstance(outcome, SessionLost) for outcome in outcomes)
    assert not any("forward" in vars(module) for module in span.model.modules())
    steps = [[desk.step(desk.open(), states(1, 3, i)) for i in range(3)] for _ in range(2)]
    assert_same(desk.run(*steps[0]), desk.each(*steps[1]))


def fail(*_: Any) -> torch.Tensor:
    raise RuntimeError("for all of them")
