"""The only file that replaces a module's forward, its class, or the attention function of a model.

A peer runs a model's own code. What it runs differently is put in its place here, so that this page shows what can be
in the way of what.

For good, when a model is loaded:

- `become`: another class of the same kind. A linear layer becomes a `SplitLinear`; a model loaded in part gets the name
  of its own class back.
- `before_each_call`: a hook. A "dynamic" rotary embedding begins each call as it was made.

For the time of one trunk pass, each in a context manager, the outermost first:

0. `replaced`, of the blocks' modules: what each block is called with is recorded, to be computed again for a backward
   (`Span.record`). Never along with 2.
1. `replaced`, of linear layers: LoRA rows (`peer.generation.joined.lora_rows`) or joined products
   (`peer.training.joined.products`). Never both: a pass is of steps or of training calls.
2. One of two ways to run steps of several sessions. Lockstep: `replaced`, of the blocks' modules and then of the trunk.
   Packing: `attention`; and, for compiled steps, `replaced` of the blocks around it.
3. `call_with`: the trunk is called with a client's adapter tensors in the place of a PEFT tree's own.

What is entered last is called first. A forward that replaces another is given it, so a module in lockstep adds LoRA
rows each time that its own turn comes. The trees of clients' adapters share the linear layers of their span as objects
(`peer.adapters.peft_trees`): what replaces a layer's forward does so for all trees.

Which blocks run at all is not decided here: a span's block list skips those that a request does not name
(`peer.span.cut`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

Forward = Callable[..., Any]


def become(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    """Make `module` a `cls`, with these attributes set."""
    module.__class__ = cls
    for name, value in attributes.items():
        setattr(module, name, value)


def before_each_call(module: nn.Module, prepare: Callable[[Any, Any], None]) -> None:
    """Have `prepare(module, arguments)` run before each call of `module`, and of its copies."""
    module.register_forward_pre_hook(prepare)


def register_attention(name: str, attend: Callable[..., Any], make_mask: Callable[..., Any]) -> None:
    """Give Transformers an attention function and its mask function, for `attention` to choose by `name`."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


@contextmanager
def attention(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Within the block models with these configurations call the attention function registered as `name`.

    A configuration passes what is set on to those of its parts: give them from the outermost in.
    """
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


@contextmanager
def replaced(modules: Iterable[nn.Module], make: Callable[[nn.Module, Forward], Forward]) -> Iterator[None]:
    """Within the block each module's forward is `make(module, forward)`, of the forward that it had before."""
    before = []
    for module in modules:
        before.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = make(module, module.forward)
    try:
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def is_replaced(module: nn.Module) -> bool:
    """Whether a module's forward is not its class's own: replaced here, or by the library that it came from."""
    return "forward" in vars(module)


def call_with(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any], *positional: Any
) -> Any:
    """What `module(*positional, **arguments)` returns, with `tensors` (by dotted name) in the place of its own."""
    if not tensors:
        return module(*positional, **arguments)
    return torch.func.functional_call(module, dict(tensors), positional, dict(arguments), tie_weights=False)
