"""Peers killed, stopped and restarted in the middle of things: the same tokens, the same loss, a short stall."""

import contextlib
import copy
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from transformers import DynamicCache, LogitsProcessorList

from client import AutoDistributedModelForCausalLM
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.errors import NoRoute
from tests.tools.arena import Arena, AtToken, assert_close, batch, one, step, with_adapter
from tests.tools.swarm import Peer, Swarm

STALL = 8.0
"""Seconds that a failure may take, on a busy machine; found by heartbeats it takes `SILENCE` more."""
SILENCE = 2.0


@pytest.fixture(scope="module")
def local(models: Callable[[str], Path]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(models("llama")).eval()


def generate_with_kill(model: Any, victim: Peer, at: int = 5, options: dict[str, Any] | None = None) -> torch.Tensor:
    """What is generated while the victim is killed at a token; its end was noticed, and passed over quickly."""
    killer = AtToken(at, victim.kill)
    tokens = model.generate(**(options or batch()), logits_processor=LogitsProcessorList([killer]))
    assert killer.done
    assert killer.stall < STALL
    assert victim.peer_id in model.swarm.health._bans
    return tokens  # type: ignore[no-any-return]


# ---- generation


@pytest.mark.parametrize(
    ("heirs", "carrier"),
    [("one peer", "direct"), ("one peer", "libp2p"), ("two peers with a part each", "auto")],
)
def test_killed_in_greedy_decoding(heirs: str, carrier: str, arena: Arena, local: Any) -> None:
    victim, heir = arena.pair()
    model = arena.connect(victim, [heir] if heirs == "one peer" else arena.parts, carrier=carrier)
    assert torch.equal(generate_with_kill(model, victim), local.generate(**batch()))


@pytest.mark.parametrize("at", [0, 1])
def test_killed_between_prefill_and_decode(at: int, arena: Arena, local: Any) -> None:
    victim, heir = arena.pair()
    assert torch.equal(generate_with_kill(arena.connect(victim, [heir]), victim, at), local.generate(**batch()))


def test_killed_before_the_first_answer(arena: Arena, local: Any) -> None:
    """The client had talked to the peer before, so it does not know of its end."""
    victim, heir = arena.pair()
    model = arena.connect(victim, [heir])
    model(**{name: batch()[name] for name in ("input_ids", "attention_mask")})
    victim.kill()
    start = time.monotonic()
    assert torch.equal(model.generate(**batch()), local.generate(**batch()))
    assert time.monotonic() - start < STALL


METHODS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "beams": lambda local: batch() | {"num_beams": 4, "num_return_sequences": 2},
    "assisted": lambda local: one() | {"assistant_model": local},
    "prompt_lookup": lambda local: one() | {"prompt_lookup_num_tokens": 4},
    "sampling": lambda local: batch() | {"do_sample": True, "top_k": 20},
}


@pytest.mark.parametrize("method", METHODS)
def test_killed_with_another_method(method: str, arena: Arena, local: Any) -> None:
    """The cache was reordered, repeated or cropped before; twice as many peers as before take over."""
    victim, _ = arena.pair()
    options = METHODS[method](local)
    torch.manual_seed(9)
    ours = generate_with_kill(arena.connect(victim, arena.parts), victim, 4, options)
    torch.manual_seed(9)
    assert torch.equal(ours, local.generate(**options))


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_killed_with_an_adapter(method: str, arena: Arena, models: Callable[[str], Path]) -> None:
    """The heirs get the adapter, and the KV prefix of the beginning."""
    victim, _ = arena.pair()
    ours = with_adapter(arena.connect(victim, arena.parts), method).eval()
    theirs = with_adapter(transformers.AutoModelForCausalLM.from_pretrained(models("llama")), method).eval()
    options = batch() | {"num_beams": 2}
    assert torch.equal(generate_with_kill(ours, victim, 4, options), theirs.generate(**options))


def test_killed_between_the_turns_of_a_conversation(arena: Arena, local: Any) -> None:
    """The user's cache outlives the peer; so does a deep copy of it, made before or after the end."""
    victim, heir = arena.pair()

    def talk(model: Any, end: Callable[[], Any]) -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        said = [model.generate(**one(), past_key_values=cache)]
        before = copy.deepcopy(cache)
        end()
        after = copy.deepcopy(cache)
        for which, word in ((before, 11), (cache, 12), (after, 13)):
            ids = torch.cat([said[0], torch.tensor([[word, 13]])], 1)
            options = one() | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4}
            said.append(model.generate(**options, past_key_values=which))
        return said

    ours = talk(arena.connect(victim, [heir]), victim.kill)
    assert all(map(torch.equal, ours, talk(local, lambda: None)))


@pytest.mark.parametrize("given", [(True, False), (False, True)], ids=["at first", "later"])
@torch.no_grad()
def test_positions_given_for_some_steps_only(given: tuple[bool, bool], arena: Arena, local: Any) -> None:
    victim, heir = arena.pair()

    def talk(model: Any, end: Callable[[], Any]) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        steps = one()["input_ids"], torch.tensor([[11]])
        positions = [torch.arange(steps[0].shape[1])[None] + 3, torch.tensor([[20]])]
        for number, ids in enumerate(steps):
            options = {"position_ids": positions[number]} if given[number] else {}
            logits: torch.Tensor = model(ids, past_key_values=cache, **options).logits
            end()
        return logits

    ours = talk(arena.connect(victim, [heir]), victim.kill)
    torch.testing.assert_close(ours, talk(local, lambda: None), rtol=0, atol=1e-5)


def test_killed_one_after_the_other(arena: Arena, local: Any) -> None:
    victim, heir = arena.pair()
    model = arena.connect(victim, [heir, *arena.parts])
    for peer in arena.parts:
        model.swarm.health.measured(peer.peer_id, 9.0)
    killers = [AtToken(4, victim.kill), AtToken(8, heir.kill)]
    tokens = model.generate(**batch(), logits_processor=LogitsProcessorList(killers))
    assert killers[1].done
    assert torch.equal(tokens, local.generate(**batch()))
    assert killers[1].stall < STALL


@pytest.mark.parametrize("family", ["mistral", "bloom"])
def test_the_founder_of_a_swarm_is_killed(family: str, models: Callable[[str], Path], swarm: Swarm) -> None:
    """It was the client's only initial peer; the window of 8 is exceeded, so old keys are gone everywhere."""
    founder, heir = swarm.serve(models(family), "0:5", "0:5")
    model = AutoDistributedModelForCausalLM.from_pretrained(str(models(family)), initial_peers=[founder.address])
    model.swarm.health.measured(heir.peer_id, 9.0)
    assert [hop.peer.peer_id for hop in model.swarm.route()] == [founder.peer_id]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(models(family)).eval()
    assert torch.equal(generate_with_kill(model, founder), theirs.generate(**batch()))


# ---- silence


@contextlib.contextmanager
def freezing(peer: Peer, wholly: bool) -> Iterator[Callable[[], None]]:
    """What stops a peer, of the whole machine also its p2pd; at the end it is killed."""
    process = psutil.Process(peer.pid)
    children = process.children(recursive=True)
    assert children
    frozen = [process, *children] if wholly else [process]
    try:
        yield lambda: [process.suspend() for process in frozen] and None
    finally:
        for each in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.resume()
        peer.kill()


@pytest.mark.parametrize("wholly", [False, True], ids=["the peer", "the whole machine"])
def test_silence_in_decoding(wholly: bool, arena: Arena, local: Any) -> None:
    """The connection stays open; of the whole machine not even p2pd answers. Found by the missing heartbeats."""
    victim, heir = arena.pair()
    model = arena.connect(victim, [heir], silence_timeout=SILENCE)
    with freezing(victim, wholly) as freeze:
        freezer = AtToken(5, freeze)
        tokens = model.generate(**batch(), logits_processor=LogitsProcessorList([freezer]))
        assert torch.equal(tokens, local.generate(**batch()))
        assert SILENCE * 0.9 < freezer.stall < SILENCE + STALL


@pytest.mark.parametrize("known", [False, True], ids=["a stranger", "talked to before"])
def test_silence_before_the_first_answer(known: bool, arena: Arena, local: Any) -> None:
    """The machine is stopped when the client, which may or may not have a connection to it already, turns to it."""
    victim, heir = arena.pair()
    options: dict[str, Any] = {"silence_timeout": SILENCE}
    with freezing(victim, wholly=True) as freeze:
        if known:
            model = arena.connect(victim, [heir], **options)
            model(input_ids=batch()["input_ids"])
            freeze()
        else:  # another first address: a membership and so a p2pd of its own
            freeze()
            model = arena.connect(victim, [heir], initial_peers=[arena.parts[0].address], **options)
        start = time.monotonic()
        assert torch.equal(model.generate(**batch()), local.generate(**batch()))
        assert time.monotonic() - start < SILENCE + STALL


def test_a_stopped_peer_comes_back(arena: Arena, local: Any) -> None:
    """Stopped and continued: what it missed is made again, and it is used again later."""
    victim, heir = arena.pair()
    model = arena.connect(victim, [heir], silence_timeout=SILENCE)
    freezer = AtToken(5, lambda: victim.send(signal.SIGSTOP))
    tokens = model.generate(**batch(), logits_processor=LogitsProcessorList([freezer]))
    victim.send(signal.SIGCONT)
    assert torch.equal(tokens, local.generate(**batch()))
    heir.kill()
    assert torch.equal(model.generate(**batch()), tokens)


def test_silence_in_training(arena: Arena, models: Callable[[str], Path]) -> None:
    victim, heir = arena.pair()
    ours = with_adapter(arena.connect(victim, [heir], silence_timeout=SILENCE))
    with freezing(victim, wholly=True) as freeze:
        found = step(ours, freeze)
    assert_close(found, step(with_adapter(transformers.AutoModelForCausalLM.from_pretrained(models("llama")))))


# ---- training


@pytest.fixture(scope="module")
def reference(models: Callable[[str], Path]) -> list[torch.Tensor]:
    return step(with_adapter(transformers.AutoModelForCausalLM.from_pretrained(models("llama"))))


@pytest.mark.parametrize(
    ("heirs", "carrier"),
    [("one peer", "direct"), ("one peer", "libp2p"), ("two peers with a part each", "auto")],
)
@pytest.mark.parametrize("when", ["before the forward", "before the backward"])
def test_killed_in_a_training_step(
    when: str, heirs: str, carrier: str, arena: Arena, reference: list[torch.Tensor]
) -> None:
    victim, heir = arena.pair()
    then = [heir] if heirs == "one peer" else arena.parts
    model = with_adapter(arena.connect(victim, then, micro_batch_tokens=14, carrier=carrier))
    assert_close(step(model), reference)
    if when == "before the forward":
        victim.kill()
    start = time.monotonic()
    assert_close(step(model, victim.kill if when == "before the backward" else lambda: None), reference)
    assert time.monotonic() - start < STALL
    assert_close(step(model), reference)


def test_dropout_masks_survive_a_kill(arena: Arena) -> None:
    """The heir computes the forward again with the very masks that the loss was made with."""
    victim, heir = arena.pair()
    undisturbed = step(with_adapter(arena.connect(victim, [heir]), "dropout"))
    disturbed = step(with_adapter(arena.connect(victim, [heir]), "dropout"), victim.kill)
    assert_close(disturbed, undisturbed)
    without = step(with_adapter(arena.connect(heir, [])))
    assert not torch.equal(undisturbed[0], without[0])


def test_prefix_gradients_survive_a_kill(arena: Arena, models: Callable[[str], Path]) -> None:
    victim, _ = arena.pair()
    ours = step(with_adapter(arena.connect(victim, arena.parts), "prefix"), victim.kill)
    assert_close(ours, step(with_adapter(transformers.AutoModelForCausalLM.from_pretrained(models("llama")), "prefix")))


def test_killed_while_an_adapter_is_put(
    arena: Arena, reference: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, heir = arena.pair()
    send, killed = Channel.send, []

    async def kill_first(self: Channel, message: Message) -> None:
        if isinstance(message.body, pb.PutAdapter) and self.remote == victim.peer_id and not killed:
            killed.append(True)
            victim.send(signal.SIGKILL)
        await send(self, message)

    monkeypatch.setattr(Channel, "send", kill_first)
    model = with_adapter(arena.connect(victim, [heir]))
    assert_close(step(model), reference)
    assert killed


def test_killed_in_the_middle_of_a_run(arena: Arena, models: Callable[[str], Path]) -> None:
    """Ten steps of AdamW, the peer killed in the fourth; the losses are those of an undisturbed run."""
    victim, heir = arena.pair()

    def run(model: Any, end: Callable[[], Any]) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for number in range(10):
            inputs = batch()["input_ids"].roll(number, 0)[:2]
            loss = model(input_ids=inputs, labels=inputs).loss
            if number == 3:
                end()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    ours = run(with_adapter(arena.connect(victim, [heir])), victim.kill)
    theirs = run(with_adapter(transformers.AutoModelForCausalLM.from_pretrained(models("llama"))), lambda: None)
    assert ours == pytest.approx(theirs, abs=1e-5)


# ---- slowness


def test_a_slow_peer_is_routed_around(models: Callable[[str], Path], swarm: Swarm, local: Any) -> None:
    """It announces what its hardware can do, and takes 0.2 s for every answer."""
    slow = swarm.serve(models("llama"), "0:5", lie="slow")[0]
    quick = swarm.serve(models("llama"), "0:5")[0]
    model: Any = AutoDistributedModelForCausalLM.from_pretrained(str(models("llama")), initial_peers=[slow.address])
    model.swarm.health.measured(quick.peer_id, 0.05)
    assert [hop.peer.peer_id for hop in model.swarm.route()] == [slow.peer_id]
    options = one() | {"max_new_tokens": 60}
    start = time.monotonic()
    assert torch.equal(model.generate(**options), local.generate(**options))
    assert time.monotonic() - start < 60 * 0.2
    assert [hop.peer.peer_id for hop in model.swarm.route()] == [quick.peer_id]
    assert not model.swarm.health._bans
    model.swarm.health.round_trips[quick.peer_id] = 0.5
    assert [hop.peer.peer_id for hop in model.swarm.route("forward")] == [slow.peer_id]
    ids = torch.ones(4, 32, dtype=torch.long)
    for _ in range(3):
        model(ids, use_cache=False)
    assert [hop.peer.peer_id for hop in model.swarm.route("forward")] == [quick.peer_id]


# ---- our own p2pd


def kill_own_p2pd() -> None:
    for child in psutil.Process().children(recursive=True):
        if child.name() == "p2pd" and child.ppid() == psutil.Process().pid:
            child.kill()


def test_our_own_p2pd_is_killed(models: Callable[[str], Path], swarm: Swarm, local: Any) -> None:
    """In a generation and in a step; by then the only initial peer is gone too."""
    founder, *_ = swarm.serve(models("llama"), "0:2", "0:2", "2:5")
    model = AutoDistributedModelForCausalLM.from_pretrained(
        str(models("llama")), initial_peers=[founder.address], look_up_period=1.0
    )
    killer = AtToken(5, kill_own_p2pd)
    assert torch.equal(
        model.generate(**batch(), logits_processor=LogitsProcessorList([killer])), local.generate(**batch())
    )
    assert killer.done
    assert killer.stall < STALL
    founder.kill()
    model.swarm.peers()
    tuned = with_adapter(model)
    theirs = with_adapter(transformers.AutoModelForCausalLM.from_pretrained(models("llama")))
    assert_close(step(tuned, kill_own_p2pd), step(theirs))


# ---- nobody left


def test_nobody_else_holds_the_blocks(arena: Arena) -> None:
    """The error names the blocks, after a few attempts."""
    victim, _ = arena.pair()
    model = arena.connect(victim, [], max_attempts=3)
    with pytest.raises(NoRoute, match="Blocks 2:5 are served by nobody that can be reached"):
        generate_with_kill(model, victim)
    with pytest.raises(NoRoute, match="Blocks 2:5 are served by nobody that can be reached"):
        step(with_adapter(model))


def test_the_only_holder_failed_of_late(arena: Arena, local: Any) -> None:
    """Work that begins while its only peer is kept away from waits for it."""
    victim, _ = arena.pair()
    model = arena.connect(victim, [])
    model.swarm.health.ban(victim.peer_id)
    assert torch.equal(model.generate(**batch()), local.generate(**batch()))


def test_restarted_under_the_same_identity(arena: Arena, local: Any, tmp_path: Path) -> None:
    """The only holder of the blocks is killed and started again; the client waits for it."""
    options = ("--identity", str(tmp_path / "identity"))
    first = arena.launch(*options)
    first.wait_ready()
    model = arena.connect(first, [])
    again: list[Peer] = []

    def restart() -> None:
        first.kill()
        again.append(arena.launch(*options))

    restarter = AtToken(5, restart)
    tokens = model.generate(**batch(), logits_processor=LogitsProcessorList([restarter]))
    again[0].wait_ready()
    assert again[0].peer_id == first.peer_id
    assert torch.equal(tokens, local.generate(**batch()))
    again[0].kill()


def test_more_peers_have_gone_than_there_are_attempts(arena: Arena, local: Any) -> None:
    """The directory names the dead for a minute; whoever was not even connected to costs no attempt."""
    victim, heir = arena.pair()
    dead = [arena.launch() for _ in range(3)]
    for peer in dead:
        peer.wait_ready()
    model = arena.connect(victim, [*dead, heir], max_attempts=1)
    model.swarm.health.measured(heir.peer_id, 60.0)
    for peer in (victim, *dead):
        peer.kill()
    assert torch.equal(model.generate(**batch()), local.generate(**batch()))
