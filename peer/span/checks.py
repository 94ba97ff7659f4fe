"""What clients send, checked before it reaches the span."""

import re
from collections.abc import Mapping

import torch

from peer.kv_cache.arena import Shape
from peer.span.span import Inputs, Mode, Span
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.errors import BadRequest, TooLong
from protocol.tensors import KvPrefix, torch_dtype

_PREFIX = re.compile(r"^prefix\.(\d{1,4})\.(key|value)$")
_MAX_BATCH = 4096


def check_mode(span: Span, context: pb.Context) -> Mode:
    """How to run a call. Raises `BadRequest` when its blocks are not all here."""
    if not span.start <= context.start < context.end <= span.end:
        raise BadRequest(
            f"Blocks {context.start}:{context.end} were asked of a peer that serves {span.start}:{span.end}."
        )
    autocast = torch_dtype(context.autocast)
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise BadRequest(f"Autocast to {autocast} is not possible; expected bfloat16 or float16.")
    seed = context.dropout_seed if context.HasField("dropout_seed") else None
    return Mode(range(context.start, context.end), context.training, seed, autocast)


def check_inputs(span: Span, message: Message, past: int, max_length: int) -> Inputs:
    """Hidden states, mask and positions of a request on top of `past` cached tokens, as they came.

    Raises `BadRequest` for wrong shapes or dtypes, `TooLong` over `max_length` tokens or the model's own positions.
    """
    hidden = message.tensor("hidden_states")
    if not hidden.is_floating_point() or hidden.ndim != 3 or hidden.shape[2] != span.hidden_size or not hidden.numel():
        raise BadRequest(
            f"hidden_states is {hidden.dtype} {list(hidden.shape)}; expected floats of shape "
            f"[batch, tokens, {span.hidden_size}]."
        )
    batch, tokens = hidden.shape[:2]
    if batch > _MAX_BATCH:
        raise BadRequest(f"A batch of {batch} rows is over the limit of {_MAX_BATCH}.")
    if past + tokens > max_length:
        raise TooLong(
            f"{past + tokens} tokens are longer than this peer allows ({max_length}); "
            "shorten the prompt or use another peer."
        )
    mask = _integers(message, "attention_mask", {(batch, past + tokens)})
    positions = _integers(message, "position_ids", {(batch, tokens), (1, tokens)})
    if positions is not None and positions.dtype == torch.bool:
        raise BadRequest("position_ids is torch.bool; expected integers.")
    _check_positions(span, past + tokens, positions)
    return Inputs(hidden, mask, positions)


def _check_positions(span: Span, tokens: int, positions: torch.Tensor | None) -> None:
    """A GPU that reads beyond a table computes nothing any more for this process."""
    limit = span.positions
    if limit is None:
        return
    found = torch.tensor([0, tokens - 1]) if positions is None else positions
    if not 0 <= int(found.min()) <= int(found.max()) < limit:
        raise TooLong(f"The blocks of this model cannot compute more than {limit} tokens; shorten the prompt.")


def check_prefix(span: Span, mode: Mode, message: Message, batch: int) -> KvPrefix:
    """The KV prefix of every block of the request, or of none, as it came. Raises `BadRequest`."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in message.tensors.items():
        if match := _PREFIX.match(name):
            if tensor.ndim != 4 or tensor.shape[0] != batch or not tensor.is_floating_point():
                raise BadRequest(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected floats, 4-D, batch {batch}.")
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    if not found:
        return {}
    if set(found) != set(mode.blocks) or any(len(pair) != 2 for pair in found.values()):
        raise BadRequest(f"A KV prefix must be given for each of blocks {mode.blocks.start}:{mode.blocks.stop}.")
    prefix = {block: (found[block]["key"], found[block]["value"]) for block in mode.blocks}
    if len({key.shape[2] for key, _ in prefix.values()} | {value.shape[2] for _, value in prefix.values()}) != 1:
        raise BadRequest("The KV prefixes of the blocks differ in length.")
    for block, pair in prefix.items():
        if [Shape.of(tensor).sizes for tensor in pair] != [shape.sizes for shape in span.kv_shapes.get(block, ())]:
            raise BadRequest(f"The KV prefix of block {block} has heads of other sizes than its keys and values.")
    return prefix


def prefix_length(tensors: Mapping[str, torch.Tensor]) -> int:
    """Tokens of the KV prefix that came with a call; 0 without one."""
    lengths = {t.shape[2] for name, t in tensors.items() if _PREFIX.match(name) and t.ndim == 4}
    return max(lengths, default=0)


def _integers(message: Message, name: str, shapes: set[tuple[int, ...]]) -> torch.Tensor | None:
    tensor = message.tensors.get(name)
    if tensor is None:
        return None
    if tensor.is_floating_point() or tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in sorted(shapes))
        raise BadRequest(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected integers of shape {expected}.")
    return tensor
