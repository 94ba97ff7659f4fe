"""Well-formed requests of every type for a peer with blocks [1, 4) of the small llama: what fuzzing begins with."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from client.adapters.bundle import AdapterBundle
from client.adapters.source import AdapterSource
from client.ghosts.tensor import GhostTensor
from protocol import swarm_pb2 as pb
from protocol.adapters import METHODS
from protocol.channel import VERSION, Message
from tests.tools.fuzzing.choices import Choices
from tests.tools.spans import END, START
from tests.tools.wire import HIDDEN, TARGET, context

_OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2, "use_dora": True},
    "ADALORA": {"init_r": 2, "target_r": 1, "total_step": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "VERA": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 8},
    "BOFT": {"boft_block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
}
_EDITS = (
    pb.CacheEdit(crop=1),
    pb.CacheEdit(crop=4),
    pb.CacheEdit(reorder=pb.IndexList(index=[0])),
    pb.CacheEdit(repeat_interleave=1),
    pb.CacheEdit(repeat_interleave=2),
    pb.CacheEdit(select=pb.IndexList(index=[0])),
)
_PREFIX = {f"prefix.{i}.{part}": torch.ones(1, 2, 3, 8) / 4 for i in range(START, END) for part in ("key", "value")}


@dataclass(frozen=True)
class Request:
    """A model whose files are given."""

    manifest: str
    pieces: int


@dataclass
class Memory:
    """What a client has been told, to be used in its next requests."""

    hello: pb.Hello
    bundles: Sequence[AdapterBundle] = ()
    weights: Request | None = None
    is_of_weights: bool = False
    """Whether its stream is one for weights."""
    number: int = 0
    """Of its next step."""
    rows: int = 1
    call_id: int = 0
    tokens: list[bytes] = field(default_factory=list)
    adapters: list[bytes] = field(default_factory=list)


def build_bundles(model: Path) -> list[AdapterBundle]:
    """A bundle of every method that may travel, as a client makes it, on two modules of each block."""
    bundles = []
    for method in METHODS:
        torch.manual_seed(3)
        config = peft.get_peft_config(
            {"peft_type": method, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
            | _OPTIONS.get(method, {})
            | ({"target_modules": ["q_proj", "down_proj"]} if method == "IA3" else {})
        )
        plain: Any = transformers.AutoModelForCausalLM.from_pretrained(model)
        layers, weights = plain.model.layers, set(plain.model.layers.parameters())
        source = AdapterSource(plain, layers)
        peft.get_peft_model(plain, config)
        _make_ghosts(layers, weights)
        snapshot = source.snapshot(fresh=True, training=False)
        assert snapshot is not None
        bundle = snapshot.bundle(range(START, END))
        assert bundle is not None
        bundles.append(bundle)
    return bundles


def _make_ghosts(layers: nn.Module, weights: Collection[nn.Parameter]) -> None:
    """Only now: what some methods begin with is computed from the weights."""
    for module in layers.modules():
        for name, parameter in module._parameters.items():
            if parameter in weights:
                module._parameters[name] = nn.Parameter(GhostTensor(parameter.to("meta"), None), requires_grad=False)


_PUSHED = (b"1" * 16, b"2" * 16)


def pick_request(choices: Choices, memory: Memory) -> Message:
    """A well-formed request, the likely ones more often."""
    if memory.is_of_weights != choices.one_in(16) and memory.weights is not None:
        return _ask_for_weights(choices, memory.weights)
    message = choices.pick(_KINDS)(choices, memory)
    if isinstance(message.body, pb.Step | pb.Forward | pb.Backward) and choices.one_in(6):
        return _handed_over(choices, message)
    return message


def _handed_over(choices: Choices, message: Message) -> Message:
    """A request whose input is, or was, pushed here, or whose result is to be pushed to somebody."""
    hand_over, tensors = message.body.hand_over, dict(message.tensors)  # type: ignore[attr-defined]
    if choices.one_in(2):
        hand_over.awaits = choices.pick(_PUSHED)
        tensors.pop("grad" if isinstance(message.body, pb.Backward) else "hidden_states")
    else:
        hand_over.to, hand_over.token, hand_over.copy = "somebody", choices.pick(_PUSHED), choices.one_in(2)
    return Message(message.body, tensors)


def _ask_for_weights(choices: Choices, weights: Request) -> Message:
    manifest = bytes.fromhex(weights.manifest)
    kind = choices.below(6)
    if kind == 0:
        return Message(pb.ReadManifest(version=VERSION, manifest=manifest))
    if kind == 1:
        return Message(pb.ReadHoldings(manifest=manifest))
    number = choices.below(weights.pieces)
    return Message(pb.ReadPiece(manifest=manifest, number=number, shares=kind > 3, insists=kind == 5))


def _push(choices: Choices, memory: Memory) -> Message:
    name = choices.pick(("hidden_states", "grad", "attention_mask"))
    return Message(pb.Push(token=choices.pick(_PUSHED)), {name: _inputs(choices)["hidden_states"]})


def _put(choices: Choices, memory: Memory) -> Message:
    if not memory.bundles:
        return Message(pb.PutAdapter(manifest="{}"), {"0": torch.ones(4, 32), "1": torch.ones(32, 4)})
    bundle = choices.pick(memory.bundles)
    return Message(pb.PutAdapter(manifest=bundle.manifest), bundle.tensors)


def _context(choices: Choices, memory: Memory) -> pb.Context:
    options: dict[str, Any] = {}
    if memory.adapters and choices.one_in(2):
        options["adapter"] = choices.pick(memory.adapters)
    if choices.one_in(6):
        options["training"] = True
    if choices.one_in(6):
        options["dropout_seed"] = 7
    if choices.one_in(8):
        options["autocast"] = pb.BFLOAT16
    if choices.one_in(4):
        options["answer"] = choices.pick((pb.BF16, pb.F16, pb.INT8, pb.LOSSLESS, 99))
    return context(**options)


def _inputs(choices: Choices, rows: int = 1) -> dict[str, torch.Tensor]:
    length = choices.pick((4, 1, 2, 30))
    tensors = {"hidden_states": HIDDEN[:, :1].expand(rows, length, -1)}
    if choices.one_in(4):
        tensors["attention_mask"] = torch.ones(rows, length, dtype=torch.int64)
    if choices.one_in(4):
        tensors["position_ids"] = torch.arange(length)[None]
    if choices.one_in(6) and rows == 1:
        tensors |= _PREFIX
        tensors.pop("attention_mask", None)
    return tensors


def _forward(choices: Choices, memory: Memory) -> Message:
    return Message(pb.Forward(context=_context(choices, memory), keep=choices.one_in(2)), _inputs(choices))


def _backward(choices: Choices, memory: Memory) -> Message:
    given = _inputs(choices)
    body = pb.Backward(context=_context(choices, memory))
    if memory.call_id and not choices.one_in(3):
        body.call_id, memory.call_id = memory.call_id, 0
        return Message(body, {"grad": given["hidden_states"]})
    return Message(body, {"grad": given["hidden_states"], **given})


def _open(choices: Choices, memory: Memory) -> Message:
    memory.number, memory.rows = 1, 1
    fork_of = memory.tokens.pop() if memory.tokens and choices.one_in(2) else b""
    return Message(pb.OpenSession(start=START, end=END, fork_of=fork_of))


def _step(choices: Choices, memory: Memory) -> Message:
    if not memory.number and not choices.one_in(8):
        return _open(choices, memory)
    edits = [choices.pick(_EDITS)] if memory.number > 1 and choices.one_in(3) else []
    for edit in edits:
        memory.rows *= edit.repeat_interleave or 1
    body = pb.Step(context=_context(choices, memory), number=memory.number, edits=edits, keep_past=choices.one_in(6))
    return Message(body, _inputs(choices, min(memory.rows, 16)))


def _read(choices: Choices, memory: Memory) -> Message:
    names = [f"{TARGET}.weight", f"{START}.mlp.down_proj.weight"]
    return Message(pb.ReadWeight(names=names, norm_dims=[1], dtype=pb.FLOAT32, transposed=choices.one_in(2)))


def _factorize(choices: Choices, memory: Memory) -> Message:
    body = pb.Factorize(name=f"{TARGET}.weight", factorization=choices.pick((pb.SVD, pb.QR, pb.LOW_RANK_SVD)), rank=4)
    tensors = {}
    if body.factorization == pb.LOW_RANK_SVD:
        body.iterations, tensors["start"] = 1, torch.ones(32, 4)
    if choices.one_in(3):
        tensors |= {"shift.b": torch.ones(32, 2), "shift.a": torch.ones(2, 32)}
    return Message(body, tensors)


def _other(choices: Choices, memory: Memory) -> Message:
    return Message(
        choices.pick(
            (
                memory.hello,
                pb.Ping(),
                pb.Result(call_id=1, token=b"x" * 16),
                pb.Welcome(version=1, start=START, end=END),
                pb.Failure(kind="BadRequest", message="no"),
                pb.Working(),
                pb.Knock(nonce=bytes(32), mac=bytes(32)),
                pb.Proof(nonce=bytes(32), certificate=b"x", mac=bytes(32)),
            )
        )
    )


_KINDS: tuple[Callable[[Choices, Memory], Message], ...] = (
    _forward, _open, _step, _step, _step, _backward, _put, _put, _other, _read, _factorize, _forward, _step,
    lambda choices, memory: Message(pb.ForkSession()), _backward, _push,
)  # fmt: skip
