"""What `peer serve` is told. Imports nothing slow: the command line is made of it (`peer.commands.fields`)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

import typer

from peer.service.quotas import Quota
from protocol.errors import BadUsage, first_line
from protocol.records import MAX_NAME

if TYPE_CHECKING:
    import torch

_QUANTIZATIONS = ("none", "int8", "nf4")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve. Each field is an option of `peer serve`, declared here only, and holds what the user typed."""

    blocks: Annotated[str | None, typer.Option(metavar="START:END", help="The blocks to serve.")] = None
    num_blocks: Annotated[int | None, typer.Option(min=1, help="How many blocks; which, the swarm's need says.")] = None
    quantize: Annotated[str, typer.Option(help="none, int8 or nf4.")] = "none"
    double_quantize: Annotated[bool, typer.Option(help="nf4: quantize the scales too (QLoRA).")] = False
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto"
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
        """The device to compute on; "auto" is the first GPU, else the CPU. Raises `BadUsage` if it is not there."""
        import torch

        if self.device == "auto":
            return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = first_line(error)[:100]
            raise BadUsage(f"--device {self.device} is not usable on this machine ({reason}).") from error
        return device


def _one_of(option: str, value: str, choices: Sequence[str]) -> str:
    """`value` when it is among `choices`. Raises `BadUsage`."""
    if value not in choices:
        raise BadUsage(f"{option} {value!r} is unknown; expected one of {', '.join(choices)}.")
    return value
