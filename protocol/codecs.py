"""Wire codecs: fewer bytes for hidden states and their gradients, where the two ends agree on it.

A codec is one of `NAMES`. A tensor travels RAW where its codec does not take its dtype, would not make it smaller, or
would make a value infinite or NaN: the sender decides, and the header says so. Every token's values are coded by
themselves, so that a prompt comes out the same in one piece or in chunks, and again when it is sent to another peer.
"""

import struct
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
import zstandard

from protocol import swarm_pb2 as pb
from protocol.errors import BadRequest

Shape = tuple[int, ...]
NAMES = {"none": pb.RAW, "bf16": pb.BF16, "f16": pb.F16, "int8": pb.INT8, "lossless": pb.LOSSLESS}
SUPPORTED = frozenset(NAMES.values())
"""The codecs that this version reads and writes."""

BLOCK = 64
"""INT8: so many values share one scale."""
_LEVEL = 1
"""The level of zstd. Hidden states of SmolLM2 come out smaller than with levels 2 to 9 (0.85 of float32, 0.70 of
bfloat16), and faster (0.3 to 0.6 GB/s on one core): there is nothing in them but a skewed distribution of exponents."""
_MAX_RATIO = 16
"""LOSSLESS: a tensor may take at most so many times its bytes on the wire, so that few bytes cannot claim much."""
_WINDOW = 2**20
"""Bytes of history that any compressed plane may ask of the decompressor; level 1 asks for half of that."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Coder(Protocol):
    """One codec."""

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether tensors of this dtype may be coded."""

    def sizes(self, shape: Shape, dtype: torch.dtype) -> range:
        """The bytes that a coded tensor may have."""

    def encode(self, tensor: torch.Tensor) -> bytes | memoryview | None:
        """The coded bytes of a contiguous tensor on the CPU; `None` when it has no finite coded form."""

    def decode(self, data: memoryview, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """The tensor. Raises `BadRequest` for what no encoder writes."""


class _Cast:
    """The values in a narrower floating dtype, rounded to nearest."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype in _FLOATS and dtype.itemsize > self._dtype.itemsize

    def sizes(self, shape: Shape, dtype: torch.dtype) -> range:
        return _exactly(prod(shape) * self._dtype.itemsize)

    def encode(self, tensor: torch.Tensor) -> memoryview | None:
        narrow = tensor.reshape(-1).to(self._dtype)
        return _bytes_of(narrow) if _is_finite(narrow) else None

    def decode(self, data: memoryview, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        return _tensor_of(data, self._dtype).to(dtype).reshape(shape)


class _BlockwiseInt8:
    """Blocks of 64 values along the last dimension; where that is no multiple of 64 its last block is shorter.

    The value of each block that is largest in magnitude travels as bfloat16: a transformer's outlier dimensions would
    cost all other values their precision (Dettmers et al. 2022, LLM.int8, keep them in 16 bits too). The others are
    `round(value / scale)`, with the scale bfloat16(the largest of them / 127): each is off by half a scale at most.

    Bytes: the integers of all values in their order (that of a block's largest is not used); then one per block of
    scales, of largest values, and of their places in the block (uint8).
    """

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype in _FLOATS

    def sizes(self, shape: Shape, dtype: torch.dtype) -> range:
        rows, _, blocks = _blocks_of(shape)
        return _exactly(prod(shape) + 5 * rows * blocks)

    def encode(self, tensor: torch.Tensor) -> bytes | None:
        rows, length, blocks = _blocks_of(tuple(tensor.shape))
        values = torch.nn.functional.pad(tensor.reshape(rows, length).float(), (0, blocks * BLOCK - length))
        values = values.view(-1, BLOCK)
        sizes = values.abs()
        places = torch.from_numpy(sizes.numpy().argmax(1))  # the first of equals, on every machine
        at = _flat(places)
        largest = values.view(-1)[at].bfloat16()
        sizes.view(-1)[at] = 0
        scales = (sizes.amax(1) / 127).bfloat16()
        if not (_is_finite(largest) and _is_finite(scales)):
            return None
        integers = (values / torch.where(scales > 0, scales, 1).float()[:, None]).round_().clamp_(-127, 127)
        integers = integers.to(torch.int8).view(rows, -1)[:, :length].contiguous()
        return b"".join(map(_bytes_of, (integers, scales, largest, places.to(torch.uint8))))

    def decode(self, data: memoryview, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        rows, length, blocks = _blocks_of(shape)
        count, each = rows * length, rows * blocks
        scales = _tensor_of(data[count : count + 2 * each], torch.bfloat16)
        largest = _tensor_of(data[count + 2 * each : count + 4 * each], torch.bfloat16)
        places = _tensor_of(data[count + 4 * each :], torch.uint8)
        if not (_is_finite(scales) and _is_finite(largest) and (places < BLOCK).all()):
            raise BadRequest("A tensor coded as int8 has scales that are no numbers, or places outside of its blocks.")
        values = _tensor_of(data[:count], torch.int8).view(rows, length).float()
        values = torch.nn.functional.pad(values, (0, blocks * BLOCK - length)).view(-1, BLOCK)
        values *= scales.float()[:, None]
        values.view(-1)[_flat(places.long())] = largest.float()
        bound = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)  # rounding a scale up can go beyond
        return values.clamp_(-bound, bound).view(rows, -1)[:, :length].to(dtype).reshape(shape)


class _ByteSplit:
    """The first bytes of all values, then the second ones, and so on, each of these planes compressed with zstd.

    Bytes: the planes' lengths (u64), then the planes. One as long as there are values is not compressed.
    """

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype in _FLOATS and dtype.itemsize <= 4

    def sizes(self, shape: Shape, dtype: torch.dtype) -> range:
        whole = prod(shape) * dtype.itemsize
        return range(-(-whole // _MAX_RATIO), whole)

    def encode(self, tensor: torch.Tensor) -> bytes:
        compressor = zstandard.ZstdCompressor(level=_LEVEL)
        parts = list[bytes]()
        for plane in _planes_of(tensor).numpy().T:
            whole = plane.tobytes()
            packed = compressor.compress(whole)
            parts.append(packed if len(packed) < len(whole) else whole)
        return struct.pack(f"<{len(parts)}Q", *map(len, parts)) + b"".join(parts)

    def decode(self, data: memoryview, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        head = struct.Struct(f"<{dtype.itemsize}Q")
        if len(data) < head.size:
            raise BadRequest("A losslessly coded tensor ends within its header.")
        lengths, offset = head.unpack(data[: head.size]), head.size
        if sum(lengths) != len(data) - offset or max(lengths) > prod(shape):
            raise BadRequest("A losslessly coded tensor has planes of other lengths than its shape and its bytes.")
        tensor = torch.empty(shape, dtype=dtype)
        planes = _planes_of(tensor).numpy()
        for number, length in enumerate(lengths):
            planes[:, number] = np.frombuffer(_unpacked(data[offset : offset + length], prod(shape)), np.uint8)
            offset += length
        return tensor


_CODERS: dict[int, _Coder] = {
    pb.BF16: _Cast(torch.bfloat16),
    pb.F16: _Cast(torch.float16),
    pb.INT8: _BlockwiseInt8(),
    pb.LOSSLESS: _ByteSplit(),
}


def compress(tensor: torch.Tensor, codec: int) -> bytes | memoryview | None:
    """The bytes of a contiguous CPU tensor under a codec; `None` when it is to travel RAW."""
    coder = _CODERS.get(codec)
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if coder is None or not coder.takes(dtype) or not tensor.numel():
        return None
    if coder.sizes(shape, dtype).start >= tensor.nbytes:
        return None
    data = coder.encode(tensor)
    return data if data is not None and len(data) in coder.sizes(shape, dtype) else None


def check_coded(entry: pb.Tensor, dtype: torch.dtype) -> None:
    """Refuse what cannot be a coded tensor, before its bytes are read. Raises `BadRequest`."""
    coder = _CODERS.get(entry.codec)
    if coder is None:
        raise BadRequest(f"Tensor {entry.name!r} has an unknown codec ({entry.codec}); the two ends differ in version.")
    name = pb.Codec.Name(entry.codec)
    if not coder.takes(dtype):
        raise BadRequest(f"Tensor {entry.name!r} is {dtype}, which the codec {name} is not for.")
    if entry.nbytes not in coder.sizes(tuple(entry.shape), dtype):
        raise BadRequest(
            f"Tensor {entry.name!r}: shape {list(entry.shape)} of {dtype} is not {entry.nbytes} bytes under {name}."
        )


def expand(data: memoryview, entry: pb.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of an entry that `check_coded` has passed. Raises `BadRequest` for what no encoder writes."""
    return _CODERS[entry.codec].decode(data, tuple(entry.shape), dtype)


def round_trip(tensor: torch.Tensor, codec: int) -> torch.Tensor:
    """`tensor` as the other end gets it: same shape, dtype and device."""
    flat = tensor.detach().to("cpu").contiguous()
    data = compress(flat, codec)
    if data is None:
        return tensor.detach()
    coded = _CODERS[codec].decode(memoryview(bytearray(data)), tuple(flat.shape), flat.dtype)
    return coded.to(tensor.device)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are; ten times as fast as `isfinite().all()`."""
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


def _flat(places: torch.Tensor) -> torch.Tensor:
    """Places in blocks as places in all of them."""
    return places + torch.arange(len(places)) * BLOCK


def _exactly(size: int) -> range:
    return range(size, size + 1)


def _blocks_of(shape: Shape) -> tuple[int, int, int]:
    """Rows, their length, and the blocks of one."""
    length = shape[-1] if shape else 1
    return prod(shape[:-1]), length, -(-length // BLOCK)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _tensor_of(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """A copy: `data` may lie anywhere, and torch wants it aligned."""
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _planes_of(tensor: torch.Tensor) -> torch.Tensor:
    """(values, bytes of one), a view."""
    return tensor.view(-1).view(torch.uint8).view(-1, tensor.element_size())


def _unpacked(data: memoryview, count: int) -> bytes | memoryview:
    """A plane of `count` bytes. A frame that is going to be anything else is refused before memory is taken for it."""
    if len(data) == count:
        return data
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != count or frame.window_size > max(count, _WINDOW) or frame.dict_id:
            raise BadRequest(f"A compressed plane of a tensor is not of {count} bytes.")
        plane: bytes = zstandard.ZstdDecompressor().decompress(data, max_output_size=count, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadRequest("A compressed plane of a tensor cannot be decompressed.") from error
    if len(plane) != count:
        raise BadRequest(f"A compressed plane of a tensor is not of {count} bytes.")
    return plane
