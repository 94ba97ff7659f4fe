"""Adapters that a hostile or broken client may put on a peer."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol import swarm_pb2 as pb
from protocol.adapters import METHODS, bundle_hash
from protocol.channel import Message
from protocol.errors import BadAdapter, BadRequest, SessionLost, UnknownAdapter
from tests.tools.spans import START
from tests.tools.swarm import ForkServer, Peer
from tests.tools.wire import HIDDEN, MIB, OPEN, TARGET, Wire, context, forward, manifest, open_wire, put


def options(**more: Any) -> dict[str, Any]:
    return manifest(options={"r": 4, "lora_alpha": 8} | more)


def test_an_adapter_is_put_and_used(wire: Wire) -> None:
    scale = 1 + (wire.carrier == "direct")  # the other carrier's adapter is still there
    good = put(manifest(), torch.ones(4, 32) / scale, torch.ones(32, 4) / scale)
    key = bundle_hash(good.body.manifest, list(good.tensors.values()))  # type: ignore[attr-defined]
    with pytest.raises(UnknownAdapter, match="put it"):
        wire.ask(forward(adapter=key))
    assert wire.ask(good).body.token == key  # type: ignore[attr-defined]
    assert not torch.equal(wire.ask(forward(adapter=key)).tensor("hidden_states"), wire.expected)


def test_the_adapters_of_a_client_that_has_gone_are_dropped(fork_server: ForkServer, models: Any) -> None:
    """But not at once: it may come back after a broken connection."""
    with open_wire(fork_server, models("llama"), "--idle-timeout", "2") as wire:
        key = wire.ask(put(manifest())).body.token  # type: ignore[attr-defined]
        wire.ask(forward(adapter=key))
        time.sleep(3)
        with pytest.raises(UnknownAdapter, match="put it"):
            wire.ask(forward(adapter=key))


NAMES = manifest()["tensors"]
ADAPTERS = {
    "no JSON": ("{", "Invalid JSON"),
    "a list": ("[]", "should be an object"),
    "deep JSON": ("[" * 10_000, "Adapter refused"),
    "an unknown field": (manifest(code="import os"), "Extra inputs"),
    "no adapter": (manifest(adapters=[]), "at least 1"),
    "a foreign method": (manifest(method="LN_TUNING"), "PEFT method 'LN_TUNING' is not one of"),
    "an invented method": (manifest(method="__import__"), "PEFT method '__import__' is not one of"),
    "a module to import": (options(megatron_core="os"), "'megatron_core' of LORA may not travel"),
    "an initialisation": (options(init_lora_weights="pissa"), "'init_lora_weights' of LORA may not travel"),
    "a path": (options(base_model_name_or_path="/etc"), "may not travel"),
    "targets by pattern": (options(target_modules=".*"), "'target_modules' of LORA may not travel"),
    "a pattern among ranks": (options(rank_pattern={"(a+)+$": 4}), "which is no target"),
    "nested options": (options(rank_pattern={TARGET: {"a": [1]}}), "nested too deeply"),
    "an infinite option": (json.dumps(options(lora_alpha=1)).replace("1}", "1e999}"), "at most"),
    "a huge rank": (options(r=2**40), "at most"),
    "no rank": (options(r=0), "PEFT refuses"),
    "a rank of text": (options(r="4"), "expected an integer"),
    "a rank of several": (manifest(options={"r": {TARGET: 4}}, parameters=[f"{TARGET}.weight"]), "nested too deeply"),
    "one rank for all": (manifest(options={"rank_pattern": 4}, parameters=[f"{TARGET}.weight"]), "one per target"),
    "a dropout of 7": (options(lora_dropout=7), "PEFT refuses"),
    "a foreign block": (manifest(targets=["0.self_attn.q_proj"]), "no module of blocks 1:4"),
    "an unknown module": (manifest(targets=[f"{START}.nothing"]), "no module of blocks 1:4"),
    "a module that is no layer": (manifest(targets=[f"{START}.self_attn"]), "PEFT refuses"),
    "a target of its insides": (manifest(targets=["1.__class__"]), "no module of blocks 1:4"),
    "a target by pattern": (manifest(targets=[".*q_proj"]), "should match pattern"),
    "no target": (manifest(targets=[]), "needs a target"),
    "a foreign parameter": (manifest(parameters=["0.self_attn.q_proj.weight"]), "no unquantized parameter .* 1:4"),
    "an unknown parameter": (manifest(parameters=[f"{TARGET}.nothing"]), "no unquantized parameter"),
    "a module for a parameter": (manifest(parameters=[TARGET]), "no unquantized parameter"),
    "insides for a parameter": (manifest(parameters=["1.__class__.__doc__"]), "no unquantized parameter"),
    "a vector": (manifest(parameters=[f"{START}.input_layernorm.weight"]), "no unquantized parameter"),
    "a parameter by pattern": (manifest(parameters=[".*weight"]), "should match pattern"),
    "a parameter of a target": (manifest(parameters=[f"{TARGET}.weight"]), "PEFT refuses"),
    "a parameter for IA3": (manifest(method="IA3", options={}, parameters=[f"{TARGET}.weight"]), "only LORA can"),
    "a name with dots": (manifest(name="a.b"), "should match pattern"),
    "a tensor not sent": (manifest(tensors=NAMES | {f"{TARGET}.lora_A.default.weight": 9}), "was not sent"),
    "a negative tensor": (manifest(tensors=NAMES | {f"{TARGET}.lora_A.default.weight": -1}), "was not sent"),
    "an unknown tensor": (manifest(tensors=NAMES | {f"{TARGET}.lora_C.default.weight": 0}), "is no part of"),
    "a base weight": (manifest(tensors=NAMES | {f"{TARGET}.base_layer.weight": 0}), "is no part of"),
    "a missing tensor": (manifest(tensors={sorted(NAMES)[0]: 0}, trainable=[]), "without 1 of its tensors"),
    "an unknown trainable": (manifest(trainable=["1.x"]), "Trainable tensor '1.x'"),
    "a scaling of nothing": (manifest(scaling={f"{START}.mlp": {"default": 1.0}}), "has no scaling"),
    "a scaling of attention": (manifest(scaling={f"{START}.self_attn": {}}), "has no scaling"),
    "a scaling of nobody": (manifest(scaling={TARGET: {"other": 1.0}}), "has no scaling for other"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "said"), ADAPTERS.values(), ids=ADAPTERS)
def test_a_wrong_adapter_is_refused(wire: Wire, content: Any, said: str) -> None:
    with pytest.raises(BadAdapter, match=said):
        wire.ask(put(content))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ((torch.ones(4, 31), torch.ones(32, 4)), r"\[4, 31\]; expected torch.float32 \[4, 32\]"),
        ((torch.ones(4, 32), torch.ones(32, 4, 1)), "expected"),
        ((torch.ones(4, 32).long(), torch.ones(32, 4)), "int64"),
        ((torch.ones(4, 32),), "was not sent"),
    ],
)
def test_wrong_adapter_tensors_are_refused(wire: Wire, tensors: tuple[torch.Tensor, ...], said: str) -> None:
    with pytest.raises(BadAdapter, match=said):
        wire.ask(put(manifest(), *tensors))


def test_an_adapter_that_contradicts_itself_is_refused_when_it_runs(wire: Wire) -> None:
    mixed = put(manifest(), torch.ones(4, 32), torch.ones(32, 4).double())
    key = wire.ask(mixed).body.token  # type: ignore[attr-defined]
    with pytest.raises(BadAdapter, match=r"cannot be run: .* same dtype"):
        wire.ask(forward(adapter=key))


def test_a_session_whose_step_failed_midway_is_lost(wire: Wire) -> None:
    """Blocks before the adapter's have cached the step's tokens: taken again and again, they would fill the memory."""
    key = wire.ask(put(manifest(), torch.ones(4, 32), torch.ones(32, 4).double())).body.token  # type: ignore[attr-defined]
    bad = Message(pb.Step(context=context(adapter=key), number=1), {"hidden_states": HIDDEN})

    async def ask() -> None:
        channel = await wire.greeted()
        await channel.call(OPEN)
        with pytest.raises(BadAdapter):
            await channel.call(bad)
        with pytest.raises(SessionLost):
            await channel.call(bad)
        channel.close()

    wire.run(ask())


def test_adapter_tensors_are_numbered(wire: Wire) -> None:
    with pytest.raises(BadAdapter, match="named 0, 1, 2"):
        wire.ask(Message(pb.PutAdapter(manifest=json.dumps(manifest())), {"0": HIDDEN, "2": HIDDEN}))


_KNOBS = ("r", "init_r", "target_r", "n_frequency", "oft_block_size", "boft_block_size", "boft_block_num")


@pytest.mark.parametrize("method", METHODS)
def test_a_huge_adapter_takes_no_memory(wire: Wire, method: str) -> None:
    huge: dict[str, Any] = {name: 2**20 for name in METHODS[method] if name in _KNOBS}
    if method == "ADALORA":
        huge["total_step"] = 10
    Path(f"/proc/{wire.peer.pid}/clear_refs").write_text("5")  # the peak begins anew
    before = peak(wire.peer)
    with pytest.raises(BadAdapter):
        wire.ask(put(manifest(method=method, options=huge)))
    assert peak(wire.peer) - before < 16 * MIB


def peak(peer: Peer) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{peer.pid}/status").read_text(), re.M)
    assert found
    return int(found[1]) * 1024


# Factors of weights, which PiSSA and OLoRA begin with

B, A, FLAWED = torch.ones(32, 2), torch.ones(2, 32), torch.full((32, 2), torch.nan)
FACTORS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "a foreign block": ({"name": "0.self_attn.q_proj.weight"}, {}, "no weight matrix of blocks 1:4"),
    "a vector": ({"name": f"{START}.input_layernorm.weight"}, {}, "no weight matrix"),
    "a bias": ({"name": f"{TARGET}.bias"}, {}, "no weight matrix"),
    "no name": ({"name": ""}, {}, "no weight matrix"),
    "insides": ({"name": "1.__class__.weight"}, {}, "no weight matrix"),
    "no factorization": ({"factorization": pb.NO_FACTORIZATION}, {}, "no known factorization"),
    "an unknown factorization": ({"factorization": 77}, {}, "no known factorization"),
    "no factors": ({"rank": 0}, {}, "between 1 and 32"),
    "more factors than there are": ({"rank": 33}, {}, "between 1 and 32"),
    "endless factors": ({"rank": 2**32 - 1}, {}, "between 1 and 32"),
    "iterations of an SVD": ({"iterations": 1}, {}, "1 iterations are too many"),
    "endless iterations": ({"factorization": pb.LOW_RANK_SVD, "iterations": 2**31}, {}, "too many; at most 64"),
    "an unknown tensor": ({}, {"x": B}, "expected \\[\\]"),
    "no start": ({"factorization": pb.LOW_RANK_SVD}, {}, "expected \\['start'\\]"),
    "another start": ({"factorization": pb.LOW_RANK_SVD}, {"start": B}, "shape \\[32, 4\\]"),
    "a start of integers": ({"factorization": pb.LOW_RANK_SVD}, {"start": torch.ones(32, 4).long()}, "int64"),
    "half a shift": ({}, {"shift.b": B}, "expected \\['shift.a', 'shift.b'\\]"),
    "the other half": ({}, {"shift.a": A}, "shift.b must have the shape \\[32, k\\]"),
    "a flat shift": ({}, {"shift.b": torch.tensor(1.0), "shift.a": A}, "shift.b must have"),
    "a shift of nothing": ({}, {"shift.b": torch.ones(32, 0), "shift.a": torch.ones(0, 32)}, "k between 1 and 4096"),
    "a huge shift": ({}, {"shift.b": torch.ones(1, 4097), "shift.a": A}, "k between 1 and 4096"),
    "a shift of another weight": ({}, {"shift.b": torch.ones(31, 2), "shift.a": A}, "floats of shape \\[32, 2\\]"),
    "a shift that does not fit": ({}, {"shift.b": B, "shift.a": torch.ones(3, 32)}, "floats of shape \\[2, 32\\]"),
    "a shift that is no number": ({}, {"shift.b": FLAWED, "shift.a": A}, "cannot be factorized"),
}


@pytest.mark.parametrize(("fields", "tensors", "said"), FACTORS.values(), ids=FACTORS)
def test_factors_that_cannot_be_had(
    wire: Wire, fields: dict[str, Any], tensors: dict[str, torch.Tensor], said: str
) -> None:
    good = {"name": f"{TARGET}.weight", "factorization": pb.SVD, "rank": 4}
    with pytest.raises(BadRequest, match=said):
        wire.ask(Message(pb.Factorize(**(good | fields)), tensors))


def test_factors_of_a_weight(wire: Wire) -> None:
    request = pb.Factorize(name=f"{TARGET}.weight", factorization=pb.SVD, rank=4)
    whole, less = (wire.ask(Message(request, given)).tensors for given in ({}, {"shift.b": B, "shift.a": A}))
    assert [tuple(whole[name].shape) for name in ("u", "s", "vh")] == [(32, 4), (4,), (4, 32)]
    assert not torch.allclose(whole["s"], less["s"], atol=1e-3)
