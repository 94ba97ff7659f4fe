"""Where fuzzed inputs come from: decisions read off a string of bytes, which a fuzzer can mutate and shorten."""

import json
from collections.abc import MutableSequence, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

INTEGERS = (
    0, 1, 2, 3, 4, 5, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 4097, 2**15, 2**16, 2**20,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**63),
)  # fmt: skip
FLOATS = (0.0, -1.0, 0.5, 2.0, 1e-320, 3e38, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "", "0", "1", "\x00", "²", "\u202e", "é" * 50, "a" * 5000, "(a+)+$", ".*", "../../etc/passwd", "1.__class__",
    "None", "hidden_states", "attention_mask", "position_ids", "prefix.1.key", "prefix.1.value", "prefix.9999.key",
    "grad", "start", "shift.a", "shift.b", "default", "1.self_attn", "1.self_attn.q_proj", "1.self_attn.q_proj.weight",
    "2.mlp.down_proj", "1.input_layernorm", "1.self_attn.q_proj.lora_A.default.weight", "4.mlp.down_proj.weight",
)  # fmt: skip


class Choices:
    """Decisions read off `data`; when it is used up, always the first of what there is to choose from."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    @property
    def is_over(self) -> bool:
        """Whether the bytes are used up."""
        return self._at >= len(self._data)

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        size = 1 if count <= 256 else 4
        return int.from_bytes(self.raw(size), "little") % count

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return options[self.below(len(options))]

    def one_in(self, count: int) -> bool:
        """True about once in `count` times; False when the bytes are used up."""
        return self.below(count) == count - 1

    def raw(self, count: int) -> bytes:
        """The next `count` bytes; fewer when they are used up."""
        data = self._data[self._at : self._at + count]
        self._at += count
        return data

    def scalar(self) -> Any:
        """Any plain value."""
        return self.pick((self.pick(INTEGERS), self.pick(FLOATS), self.pick(TEXTS), None, True, [], {}))


def mutate_bytes(choices: Choices, data: bytes) -> bytes:
    """`data` with a few bytes changed, put in, left out or repeated."""
    result = bytearray(data)
    for _ in range(1 + choices.below(4)):
        at = choices.below(len(result) + 1)
        length = choices.pick((1, 2, 4, 8, 64))
        what = choices.below(6)
        if what == 0:
            result[at : at + 1] = bytes([choices.below(256)])
        elif what == 1:
            del result[at : at + length]
        elif what == 2:
            result[at:at] = choices.raw(length)
        elif what == 3:
            result[at:at] = result[at : at + length]
        elif what == 4:
            del result[at:]
        else:
            result[at : at + length] = (choices.pick(INTEGERS) % 2 ** (8 * length)).to_bytes(length, "little")
    return bytes(result)


def mutate_json(choices: Choices, text: str) -> str:
    """JSON like `text`, with a few values and names changed; sometimes no JSON any more."""
    if choices.one_in(16):
        return mutate_bytes(choices, text.encode()).decode(errors="replace")
    try:
        whole = [json.loads(text)]
    except ValueError:  # it has been through this before
        return text
    for _ in range(1 + choices.below(3)):
        _mutate_node(choices, whole)
    return json.dumps(whole[0])


def _mutate_node(choices: Choices, whole: list[Any]) -> None:
    places: list[tuple[Any, Any]] = []
    _collect(whole, places)
    parent, key = choices.pick(places)
    what = choices.below(5)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, dict):
        parent[choices.pick(TEXTS)] = parent.pop(key)
    elif what == 2:
        other_parent, other_key = choices.pick(places)
        if other_key in other_parent or isinstance(other_parent, list):
            parent[key] = json.loads(json.dumps(_get(other_parent, other_key)))
    elif what == 3 and isinstance(parent[key], MutableSequence) and parent[key]:
        parent[key] *= 2
    else:
        parent[key] = choices.scalar()
    if not whole:
        whole.append(choices.scalar())


def _get(parent: Any, key: Any) -> Any:
    return parent[key] if isinstance(parent, dict) or key < len(parent) else None


def _collect(node: Any, places: list[tuple[Any, Any]]) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        places.append((node, key))
        _collect(value, places)
