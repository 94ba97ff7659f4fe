"""Tensors and records on the wire under arbitrary input; the generated code."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import generate
from protocol import swarm_pb2 as pb
from protocol.errors import BadRequest, PeerFailed, PeerFull, TooLong, from_failure, to_failure
from protocol.records import MAX_RECORD_BYTES, ModelId, PeerRecord, Speed
from protocol.tensors import Limits, check_entries, decode, encode

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32]
DTYPES += [torch.bool, torch.uint8]
SHAPES = st.lists(st.integers(0, 5), max_size=4)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits, NaN and infinities included; contiguous or not."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    top = 2 if dtype == torch.bool else 256
    count = torch.Size(shape).numel() * dtype.itemsize
    flat = torch.randint(top, (count,), generator=generator, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), tensors(), max_size=6))
def test_tensors_survive_the_wire(given_tensors: dict[str, torch.Tensor]) -> None:
    parts = [encode(name, tensor) for name, tensor in given_tensors.items()]
    header = pb.Frame.FromString(pb.Frame(tensors=[e for e, _ in parts], ping=pb.Ping()).SerializeToString())
    payload = bytearray(b"".join(data for _, data in parts))
    check_entries(header.tensors, len(payload), Limits())
    decoded = decode(header.tensors, payload)
    assert list(decoded) == list(given_tensors)
    for name, tensor in given_tensors.items():
        assert decoded[name].shape == tensor.shape
        assert decoded[name].dtype == tensor.dtype
        assert encode(name, decoded[name])[1] == encode(name, tensor)[1]


def test_one_element_of_a_wide_tensor_is_sent() -> None:
    """It is contiguous, whatever its stride."""
    column = torch.arange(8.0).reshape(2, 4)[:1, :1]
    flat = torch.arange(8.0).as_strided((1,), (4,))
    assert bytes(encode("a", column)[1]) == bytes(encode("a", flat)[1]) == bytes(4)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda **fields: pb.Tensor(**fields),
            name=st.sampled_from(["a", "b", ""]),
            dtype=st.integers(0, 10),
            shape=st.lists(st.integers(0, 4) | st.sampled_from([2**20, 2**31, 2**63, 2**64 - 1]), max_size=10),
            codec=st.sampled_from([0, 0, 1, 2, 3, 4, 5]),
            nbytes=st.one_of(st.integers(0, 64), st.integers(0, 2**64 - 1)),
        ),
        max_size=4,
    ),
    st.integers(0, 256),
)
def test_arbitrary_headers_are_decoded_or_refused(entries: list[pb.Tensor], length: int) -> None:
    with suppress(BadRequest):
        check_entries(entries, length, Limits())
        decoded = decode(entries, bytearray(length))
        assert [list(tensor.shape) for tensor in decoded.values()] == [list(entry.shape) for entry in entries]
        raw = [tensor.nbytes for tensor, entry in zip(decoded.values(), entries, strict=True) if not entry.codec]
        assert sum(raw) == sum(entry.nbytes for entry in entries if not entry.codec)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def record(**changes: Any) -> dict[str, Any]:
    made = PeerRecord(
        peer_id="Qm" + "a" * 44,
        model=ModelId(name="m", config_hash="0" * 32, num_blocks=9),
        start=2,
        end=5,
        dtype="float32",
        quantization="none",
        addresses=("/ip4/1.2.3.4/tcp/5/p2p/Qm",),
        speed=Speed(decode=1.5, forward=2),
        free_cache_tokens=7,
        max_length=8,
        version="1",
    )
    return made.model_dump(mode="json") | changes


def test_a_record_survives_the_wire() -> None:
    made = PeerRecord.from_bytes(json.dumps(record()).encode())
    assert PeerRecord.from_bytes(made.to_bytes()) == made


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(BadRequest):
        PeerRecord.from_bytes(data)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(record())), JSON)
def test_a_record_with_one_arbitrary_field_is_sound_or_refused(field: str, value: Any) -> None:
    with suppress(BadRequest):
        made = PeerRecord.from_bytes(json.dumps(record(**{field: value})).encode())
        assert 0 <= made.start < made.end <= made.model.num_blocks <= 4096
        assert 0 < made.speed.decode < float("inf")
        assert len(made.name) <= 100


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 5},
        {"end": 10},
        {"start": -1},
        {"speed": {"decode": 0, "forward": 1}},
        {"speed": {"decode": float("nan"), "forward": 1}},
        {"peer_id": "../../etc/passwd" * 2},
        {"addresses": ["a" * 301]},
        {"addresses": ["a"] * 21},
        {"name": "n" * 101},
        {"trainable": {"row": -1, "tokens": 1}},
        {"trainable": {"row": 1, "tokens": 2**40}},
        {"model": {"name": "m", "config_hash": "0" * 32, "num_blocks": 5000}},
        {"state": "on fire"},
        {"name": "\x1b[2J"},
        {"version": "1\n2"},
        {"addresses": ["/ip4/1.2.3.4\r"]},
        {"model": {"name": "m\u202e", "config_hash": "0" * 32, "num_blocks": 9}},
        {"padding": "x" * MAX_RECORD_BYTES},
    ],
)
def test_a_wrong_record_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        PeerRecord.from_bytes(json.dumps(record(**changes)).encode())


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    committed = Path(generate.__file__).parent
    made = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*_pb2.py*")]
    assert len(made) == 4
    for name in made:
        assert (tmp_path / name).read_text() == (committed / name).read_text(), "run: python -m protocol.generate"


def test_what_a_peer_says_of_its_failure_is_one_line() -> None:
    hostile = pb.Failure(kind="PeerFull", message="\x1b[2J full\nerror: pay" + "!" * 9000, retry_after=1e300)
    error = from_failure(hostile, "Qm")
    assert isinstance(error, PeerFull)
    assert str(error).isprintable()
    assert "full error: pay" in str(error)
    assert str(error).endswith("(peer Qm).")
    assert len(str(error)) < 2100
    assert error.retry_after == 600


@pytest.mark.parametrize("kind", ["", "Exception", "SystemExit", "BadUsage", "NoSuch"])
def test_an_unknown_failure_is_the_peers(kind: str) -> None:
    error = from_failure(pb.Failure(kind=kind, retry_after=float("nan")), "Qm")
    assert type(error) is PeerFailed
    assert error.retry_after == 0


def test_errors_survive_the_wire() -> None:
    error = from_failure(to_failure(TooLong("It is too long.")), "Qm")
    assert (type(error), str(error)) == (TooLong, "It is too long (peer Qm).")
    assert type(from_failure(to_failure(KeyError("x")), "Qm")) is PeerFailed
