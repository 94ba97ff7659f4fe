"""Tensors to bytes and back. Bytes that arrive are checked before any memory is taken for them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from protocol import swarm_pb2 as pb
from protocol.codecs import check_coded, compress, expand
from protocol.errors import BadRequest

MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**40
"""The elements that a tensor may have, a dimension of 0 counted as 1: torch refuses an empty tensor whose strides
overflow."""

_TORCH = {
    pb.FLOAT32: torch.float32,
    pb.FLOAT16: torch.float16,
    pb.BFLOAT16: torch.bfloat16,
    pb.FLOAT64: torch.float64,
    pb.INT64: torch.int64,
    pb.INT32: torch.int32,
    pb.BOOL: torch.bool,
    pb.UINT8: torch.uint8,
}
_WIRE = {dtype: number for number, dtype in _TORCH.items()}
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The name that users give -> the dtype that a model can be run in."""
KvPrefix = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Trainable keys and values before the tokens: block -> (key, value), each (batch, heads, tokens, head size)."""


def prefix_tokens(prefix: KvPrefix) -> int:
    """Tokens of a prefix; 0 when it is empty."""
    return next(iter(prefix.values()))[0].shape[2] if prefix else 0


@dataclass(frozen=True)
class Limits:
    """What one frame may hold."""

    max_header: int = 4 * 2**20
    """Bytes of the protobuf part."""
    max_payload: int = 512 * 2**20
    """Bytes of all tensors together, as they travel and as they come out of their codecs."""
    max_tensors: int = 50_000
    """Tensors of an adapter or an answer; `protocol.channel` limits the other kinds of messages."""


def wire_dtype(dtype: torch.dtype | None) -> pb.DType:
    """The wire's name of a torch dtype; `None` is `DTYPE_NONE`. Raises `BadRequest` for a dtype it has no name for."""
    if dtype is None:
        return pb.DTYPE_NONE
    if dtype not in _WIRE:
        raise BadRequest(f"Tensors of dtype {dtype} cannot be sent; expected one of {', '.join(map(str, _WIRE))}.")
    return _WIRE[dtype]


def torch_dtype(number: int) -> torch.dtype | None:
    """The torch dtype of a wire name; `DTYPE_NONE` is `None`. Raises `BadRequest` for an unknown number."""
    if number == pb.DTYPE_NONE:
        return None
    dtype: torch.dtype | None = _TORCH.get(number)  # type: ignore[call-overload]
    if dtype is None:
        raise BadRequest(f"Unknown dtype number {number} on the wire; the two ends run different versions.")
    return dtype


def encode(name: str, tensor: torch.Tensor, codec: int = pb.RAW) -> tuple[pb.Tensor, memoryview]:
    """The header entry of `tensor` and its bytes: a view where it is contiguous and on the CPU, else one copy.

    `codec` is used where it fits, see `protocol.codecs`; the entry says whether it was.
    """
    tensor = tensor.detach().to("cpu").contiguous()
    coded = compress(tensor, codec) if codec != pb.RAW else None
    if coded is not None:
        entry = pb.Tensor(name=name, dtype=wire_dtype(tensor.dtype), shape=tensor.shape, nbytes=len(coded))
        entry.codec = codec  # type: ignore[assignment]
        return entry, memoryview(coded)
    # A dimension of 1 may have any stride and is contiguous all the same.
    flat: Any = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy() if tensor.numel() else b""
    data = memoryview(flat)
    entry = pb.Tensor(name=name, dtype=wire_dtype(tensor.dtype), shape=tensor.shape, nbytes=data.nbytes)
    return entry, data


@dataclass
class Encoded:
    """Tensors as they travel in one frame."""

    entries: list[pb.Tensor] = field(default_factory=list)
    data: list[memoryview] = field(default_factory=list)
    nbytes: int = 0
    """Of all `data`."""
    decoded: int = 0
    """Bytes of the tensors' elements."""


def encode_all(tensors: Mapping[str, torch.Tensor], codecs: Mapping[str, int]) -> Encoded:
    """All tensors, each under its codec of `codecs`, if there is one; see `encode`."""
    coded = Encoded()
    for name, tensor in tensors.items():
        entry, data = encode(name, tensor, codecs.get(name, pb.RAW))
        coded.entries.append(entry)
        coded.data.append(data)
        coded.nbytes += entry.nbytes
        coded.decoded += tensor.numel() * tensor.element_size()
    return coded


def check_entries(entries: Sequence[pb.Tensor], payload: int, limits: Limits) -> int:
    """Check a header before its tensors' bytes are read. Returns the bytes that the tensors take when decoded.

    Raises `BadRequest` when there are too many, when a name repeats, when shape, dtype, codec and byte counts disagree,
    or when they would come out of their codecs larger than a payload may be.
    """
    if len(entries) > limits.max_tensors:
        raise BadRequest(f"A message of {len(entries)} tensors; one of its kind has at most {limits.max_tensors}.")
    total, decoded, names = 0, 0, set[str]()
    for entry in entries:
        dtype = torch_dtype(entry.dtype)
        if dtype is None:
            raise BadRequest(f"Tensor {entry.name!r} has no dtype.")
        if len(entry.shape) > MAX_DIMENSIONS:
            raise BadRequest(f"Tensor {entry.name!r} has {len(entry.shape)} dimensions; at most {MAX_DIMENSIONS}.")
        elements = prod(entry.shape)
        if (elements or prod(size or 1 for size in entry.shape)) > MAX_ELEMENTS:
            raise BadRequest(f"Tensor {entry.name!r} of shape {list(entry.shape)} is over {MAX_ELEMENTS} elements.")
        size = elements * dtype.itemsize
        if entry.codec != pb.RAW:
            check_coded(entry, dtype)
        elif size != entry.nbytes:
            raise BadRequest(
                f"Tensor {entry.name!r}: shape {list(entry.shape)} of {dtype} is not {entry.nbytes} bytes."
            )
        if entry.name in names:
            raise BadRequest(f"Tensor name {entry.name!r} is repeated.")
        names.add(entry.name)
        total, decoded = total + entry.nbytes, decoded + size
    if total != payload:
        raise BadRequest(f"The frame announces {payload} bytes, but its tensors have {total}.")
    if decoded > limits.max_payload:
        raise BadRequest(f"The frame's tensors take {decoded} bytes decoded, over the limit of {limits.max_payload}.")
    return decoded


def decoded_size(entries: Iterable[pb.Tensor]) -> int:
    """The bytes that the coded tensors of a checked header take when they are decoded; RAW ones are not counted."""
    coded = ((entry, torch_dtype(entry.dtype)) for entry in entries if entry.codec != pb.RAW)
    return sum(prod(entry.shape) * dtype.itemsize for entry, dtype in coded if dtype is not None)


def decode(entries: Iterable[pb.Tensor], payload: bytearray) -> dict[str, torch.Tensor]:
    """The tensors of a checked header, as views of `payload` where alignment and codec permit.

    Raises `BadRequest` for coded bytes that no encoder writes.
    """
    tensors: dict[str, torch.Tensor] = {}
    offset = 0
    for entry in entries:
        dtype = torch_dtype(entry.dtype)
        assert dtype is not None
        shape = tuple(entry.shape)
        if not entry.nbytes:
            tensors[entry.name] = torch.empty(shape, dtype=dtype)
            continue
        if entry.codec != pb.RAW:
            tensors[entry.name] = expand(memoryview(payload)[offset : offset + entry.nbytes], entry, dtype)
        elif offset % dtype.itemsize:
            data = payload[offset : offset + entry.nbytes]
            tensors[entry.name] = torch.frombuffer(data, dtype=dtype).reshape(shape)
        else:
            count = entry.nbytes // dtype.itemsize
            flat = torch.frombuffer(payload, dtype=dtype, count=count, offset=offset)
            tensors[entry.name] = flat.reshape(shape)
        offset += entry.nbytes
    return tensors


def nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that the elements of `tensors` take."""
    return sum(t.numel() * t.element_size() for t in tensors.values())
