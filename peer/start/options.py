"""What `peer serve` is told. Imports nothing slow: the command line is made of it (`peer.commands.options`)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import typer

from peer.service.quotas import Quota
from peer.weights.options import WeightsOptions
from protocol.errors import BadUsage
from protocol.records import MAX_NAME

if TYPE_CHECKING:
    import torch

_QUANTIZATIONS = ("none", "int8", "nf4")


@dataclass(frozen=True)
class MemoryLimit:
    """What a peer may take of its device's memory."""

    amount: float
    is_percent: bool
    """Whether `amount` is percent, or bytes."""

    def of(self, total: int) -> int:
        """Bytes, of a device's `total`."""
        return int(total * self.amount / 100 if self.is_percent else self.amount)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve. Each field is an option of `peer serve`, declared here only, and holds what the user typed."""

    blocks: Annotated[str | None, typer.Option(metavar="START:END", help="The blocks to serve.")] = None
    num_blocks: Annotated[int | None, typer.Option(min=1, help="How many blocks; which, the swarm's need says.")] = None
    quantize: Annotated[str, typer.Option(help="none, int8 or nf4.")] = "none"
    double_quantize: Annotated[bool, typer.Option(help="nf4: quantize the scales too (QLoRA).")] = False
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[
        str,
        typer.Option(help="auto (the first GPU that works, else the CPU), cpu, cuda:0, ...; or several: a peer each."),
    ] = "auto"
    """The several of a command have commas between them. A peer's own is one: `for_each_device`."""
    memory: Annotated[
        str | None,
        typer.Option(metavar="GB|PERCENT%", help="What to take of the device's memory at most; default: what is free."),
    ] = None
    name: Annotated[str, typer.Option(help="A name for people.")] = ""
    max_length: Annotated[int, typer.Option(min=1, help="Tokens that one session may hold.")] = 8192
    cache_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that all sessions may hold.")] = None
    """None: what a share of the free memory holds."""
    idle_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds after which a generation may have to give its memory to others.")
    ] = 30.0
    max_message: Annotated[
        int | None, typer.Option(min=2**20, help="Bytes of tensors in one message; default: 512 MiB.")
    ] = None
    quota: Quota = field(default_factory=Quota)
    weights: WeightsOptions = field(default_factory=WeightsOptions)
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that clients get to go elsewhere when this peer is told to stop.")
    ] = 30.0
    threads: Annotated[int | None, typer.Option(min=1, max=4096, help="CPU threads to compute with.")] = None
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile decode steps (torch.compile): starts later, steps sooner.")
    ] = False
    join_training: Annotated[
        bool | None, typer.Option(help="Run small training calls of several clients together; default: on CPUs.")
    ] = None

    def check(self) -> None:
        """Raises `BadUsage` for what cannot be right, on whatever machine."""
        _one_of("--quantize", self.quantize, _QUANTIZATIONS)
        if self.double_quantize and self.quantize != "nf4":
            raise BadUsage("--double-quantize goes with --quantize nf4 only.")
        if self.blocks is not None and self.num_blocks is not None:
            raise BadUsage("Give --blocks or --num-blocks, not both.")
        self.span()
        _ = self.memory_limit
        if len(self.name) > MAX_NAME or not self.name.isprintable():
            raise BadUsage(f"--name must be at most {MAX_NAME} printable characters.")

    def span(self, total: int | None = None) -> range | None:
        """The blocks to serve; `None`: those that the swarm needs most.

        Raises `BadUsage` when they are malformed, none at all, or not in a model of `total` blocks, be it that only
        their number is given.
        """
        text = self.blocks
        if text is None:
            if self.num_blocks is not None and total is not None and self.num_blocks > total:
                raise BadUsage(f"--num-blocks {self.num_blocks} is out of range: the model has {total} blocks.")
            return None
        match = re.fullmatch(r"(\d{1,5}):(\d{1,5})", text.strip())
        if not match:
            raise BadUsage(f"--blocks {text!r} is not a span; expected START:END, such as 0:12.")
        blocks = range(int(match[1]), int(match[2]))
        if not blocks:
            raise BadUsage(f"--blocks {text} is empty; END must be greater than START.")
        if total is not None and blocks.stop > total:
            raise BadUsage(f"--blocks {text} is out of range: the model has blocks 0:{total}.")
        return blocks

    def for_each_device(self) -> Sequence["ServeOptions"]:
        """The options of each device's peer. The spans in `blocks` are in the devices' order.

        Several peers on one device have equal parts of it. Raises `BadUsage`.
        """
        devices = [device.strip() for device in self.device.split(",")]
        if len(devices) == 1:
            return [self]
        spans = self.blocks.split(",") if self.blocks is not None else [None] * len(devices)
        if len(spans) != len(devices):
            raise BadUsage(
                f"--device names {len(devices)} devices and --blocks {self.blocks} {len(spans)} span(s); expected one "
                "for each, such as --blocks 0:12,12:24."
            )
        return [
            replace(self, device=device, blocks=blocks, memory=self.memory or _equal_part(devices.count(device)))
            for device, blocks in zip(devices, spans, strict=True)
        ]

    @cached_property
    def memory_limit(self) -> MemoryLimit | None:
        """`None`: all that is free. Raises `BadUsage`."""
        if self.memory is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|%|)", self.memory.strip())
        if not match or not float(match[1]) or (match[2] == "%" and float(match[1]) > 100):
            raise BadUsage(
                f"--memory {self.memory!r} is no amount of memory; expected GB, such as 10, or percent: 50%."
            )
        is_percent = match[2] == "%"
        return MemoryLimit(float(match[1]) * (1 if is_percent else 10**9), is_percent)

    @property
    def joins_training(self) -> bool:
        """Whether small training calls of several clients run together. On GPUs no gain has been measured yet."""
        return self.torch_device.type == "cpu" if self.join_training is None else self.join_training

    def check_machine(self) -> None:
        """Raises `BadUsage` for a dtype or a device that this machine does not have. Imports torch."""
        _ = self.weights_dtype, self.torch_device

    @cached_property
    def weights_dtype(self) -> "torch.dtype | None":
        """The dtype to compute in; `None`: the checkpoint's own. Raises `BadUsage` for an unknown one."""
        from protocol.tensors import COMPUTE_DTYPES

        return COMPUTE_DTYPES.get(_one_of("--dtype", self.dtype, ("auto", *COMPUTE_DTYPES)))

    @cached_property
    def torch_device(self) -> "torch.device":
        """The device to compute on. Raises `BadUsage` if it is not there or does not work."""
        from protocol.machine.devices import choose_device

        return choose_device(self.device)


def _equal_part(peers: int) -> str | None:
    """Of what is there for peers: a GPU's driver takes some 0.3 GB for each process."""
    return f"{96 / peers:.1f}%" if peers > 1 else None


def _one_of(option: str, value: str, choices: Sequence[str]) -> str:
    """`value` when it is among `choices`. Raises `BadUsage`."""
    if value not in choices:
        raise BadUsage(f"{option} {value!r} is unknown; expected one of {', '.join(choices)}.")
    return value
