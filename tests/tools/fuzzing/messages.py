"""Frames for fuzzing: well-formed messages as bytes, and what may be wrong with them."""

import struct
from collections.abc import Mapping
from typing import Any

import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage

from protocol import swarm_pb2 as pb
from protocol.codecs import SUPPORTED
from protocol.tensors import encode
from tests.tools.fuzzing.choices import FLOATS, INTEGERS, TEXTS, Choices, mutate_bytes, mutate_json

_BODIES = {field.message_type.name: field.name for field in pb.Frame.DESCRIPTOR.oneofs_by_name["body"].fields}
_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**32),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**64),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**32),
}
"""The least value, and how many there are."""
_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
)

Tensors = dict[str, torch.Tensor]


def mutated_frame(choices: Choices, body: ProtoMessage, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of a frame in which up to three things are not as they were."""
    body, given = _copy(body), dict(tensors)
    in_frame = in_bytes = False
    for _ in range(choices.pick((1, 0, 1, 2, 3))):
        what = choices.below(8)
        if what < 3:
            _mutate_body(choices, body)
        elif what < 6:
            _mutate_tensors(choices, given)
        elif what == 6:
            in_frame = True
        else:
            in_bytes = True
    header, payload = build_frame(body, given, choices.pick((pb.RAW, pb.RAW, *sorted(SUPPORTED))))
    if in_frame:
        mutate_fields(choices, header)
    data = to_bytes(header.SerializeToString(), payload)
    return mutate_wire(choices, data) if in_bytes else data


def build_frame(body: ProtoMessage, tensors: Mapping[str, torch.Tensor], codec: int = pb.RAW) -> tuple[pb.Frame, bytes]:
    """The header and the payload of a message, all of its tensors under one codec."""
    parts = [encode(name, tensor, codec) for name, tensor in tensors.items()]
    header = pb.Frame(tensors=[entry for entry, _ in parts])
    getattr(header, _BODIES[type(body).__name__]).CopyFrom(body)
    return header, b"".join(data for _, data in parts)


def to_bytes(header: bytes, payload: bytes) -> bytes:
    """A whole frame."""
    return struct.pack("<IQ", len(header), len(payload)) + header + payload


def mutate_fields(choices: Choices, message: ProtoMessage) -> None:
    """Change one field of `message` or of a message in it."""
    places = [(message, field) for field in message.DESCRIPTOR.fields]
    for inner in _messages_in(message):
        places += [(inner, field) for field in inner.DESCRIPTOR.fields]
    if not places:
        return
    owner, field = choices.pick(places)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        getattr(owner, field.name)[choices.pick(TEXTS)] = choices.pick(TEXTS)
    elif field.is_repeated:
        _mutate_list(choices, getattr(owner, field.name), field)
    elif choices.one_in(4):
        owner.ClearField(field.name)
    elif field.message_type is not None:
        getattr(owner, field.name).SetInParent()
    else:
        setattr(owner, field.name, _value(choices, field, getattr(owner, field.name)))


def _mutate_list(choices: Choices, items: Any, field: FieldDescriptor) -> None:
    what, at = choices.below(4), choices.below(len(items) or 1)
    if what == 0 and items:
        del items[at]
    elif what == 1 and items:
        items.extend([items[at]] * choices.pick((1, 2, 8, 300)))
    elif what == 2 and len(items) > 1:
        copies = [_copy(item) if field.message_type is not None else item for item in items]
        del items[:]
        items.extend(reversed(copies))
    elif field.message_type is not None:
        items.add()
    else:
        items.append(_value(choices, field, None))


def _value(choices: Choices, field: FieldDescriptor, old: Any) -> Any:
    if field.cpp_type in _BITS:
        low, count = _BITS[field.cpp_type]
        number = (old or 0) + choices.pick((-1, 1)) if choices.one_in(3) else choices.pick(INTEGERS)
        return (number - low) % count + low
    if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        return choices.pick(FLOATS)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return not old
    if field.type == FieldDescriptor.TYPE_BYTES:
        return mutate_bytes(choices, old or b"")
    return choices.pick(TEXTS)


def _mutate_body(choices: Choices, body: ProtoMessage) -> None:
    if isinstance(body, pb.PutAdapter) and body.manifest and not choices.one_in(8):
        body.manifest = mutate_json(choices, body.manifest)
    else:
        mutate_fields(choices, body)


def _mutate_tensors(choices: Choices, tensors: Tensors) -> None:
    """Change a tensor so that the frame is still one: its dtype, shape, values, name, or whether it is there."""
    name = choices.pick(sorted(tensors)) if tensors else ""
    tensor = tensors.get(name, torch.ones(1, 4, 32))
    what = choices.below(6)
    if what == 0:
        tensors.pop(name, None)
    elif what == 1:
        tensors[choices.pick((*TEXTS, *map(str, range(4))))] = tensor
    elif what == 2:
        tensors[name] = tensor.to(choices.pick(_DTYPES))
    elif what == 3:
        tensors[name] = torch.full_like(tensor, choices.pick((0, 1, -1, 127)))
    elif what == 4 and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, choices.pick(FLOATS), dtype=torch.float64).to(tensor.dtype)
    else:
        tensors[name] = _reshaped(choices, tensor)


def _reshaped(choices: Choices, tensor: torch.Tensor) -> torch.Tensor:
    what = choices.below(5)
    dim = choices.below(tensor.ndim) if tensor.ndim else 0
    if what == 0 and tensor.ndim < 8:
        return tensor.unsqueeze(dim)
    if tensor.ndim == 0 or what == 1:
        return tensor.reshape(-1)
    if what == 2:
        return tensor.narrow(dim, 0, choices.below(tensor.shape[dim] + 1))
    if what == 3:
        return tensor.transpose(0, dim)
    return torch.cat([tensor] * choices.pick((2, 3, 17)), dim) if tensor.numel() < 2048 else tensor.select(dim, 0)


def mutate_wire(choices: Choices, data: bytes) -> bytes:
    """A frame with other bytes, or with wrong lengths."""
    if choices.one_in(2):
        return mutate_bytes(choices, data)
    header, payload = struct.unpack("<IQ", data[:12])
    header = choices.pick((header, choices.pick(INTEGERS))) % 2**32
    payload = choices.pick((payload, choices.pick(INTEGERS))) % 2**64
    return struct.pack("<IQ", header, payload) + data[12:]


def _messages_in(message: ProtoMessage) -> list[ProtoMessage]:
    found: list[ProtoMessage] = []
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for inner in value if field.is_repeated else [value]:
            found += [inner, *_messages_in(inner)]
    return found


def _copy(message: ProtoMessage) -> ProtoMessage:
    twin = type(message)()
    twin.CopyFrom(message)
    return twin
