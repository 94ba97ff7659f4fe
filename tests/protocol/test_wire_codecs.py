"""Wire codecs: what comes out is what each promises; what no encoder writes is refused; a swarm that uses them."""

import asyncio
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.traffic import counting
from client.swarm.config import SwarmConfig
from protocol import channel as channel_module
from protocol import swarm_pb2 as pb
from protocol.channel import Channel, Message
from protocol.codecs import BLOCK, NAMES, compress, round_trip
from protocol.errors import BadRequest, BadUsage
from protocol.tensors import Limits, check_entries, decode, encode
from tests.tools.arena import assert_close, batch, step, with_adapter
from tests.tools.fuzzing.carrier import connect
from tests.tools.fuzzing.targets import bounded_memory
from tests.tools.swarm import Swarm
from tests.tools.wire import HIDDEN, OPEN, Wire, forward
from tests.tools.wire import step as step_message

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SPECIAL = [0.0, -0.0, 1e-45, -1e-39, 65504.0, 3e38, float("inf"), float("-inf"), float("nan")]
PAYLOAD = {2: 0x7FFF, 4: 0x7FC12345, 8: 0x7FF8000012345678}
"""A NaN that carries something, by bytes."""


@st.composite
def tensors(draw: st.DrawFn, specials: bool = True) -> torch.Tensor:
    """What may stand in hidden states, and what should not."""
    shape = draw(st.sampled_from([(), (0,), (1,), (3, 0, 5), (2, 3, 64), (1, 4, 100), (5, 1), (1, 2, 576)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(FLOATS))
    tensor = (torch.randn(shape, generator=generator, dtype=torch.float64) * 10 ** draw(st.integers(-6, 4))).to(dtype)
    if specials and tensor.numel():
        flat = tensor.view(-1)
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
            flat[draw(st.integers(0, len(flat) - 1))] = value
        if draw(st.booleans()):
            bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
            bits[-1] = PAYLOAD[dtype.itemsize]
    return tensor


def over_the_wire(tensor: torch.Tensor, codec: int) -> torch.Tensor:
    entry, data = encode("x", tensor, codec)
    assert entry.codec in (codec, pb.RAW)
    entry = pb.Tensor.FromString(entry.SerializeToString())
    before = encode("before", torch.ones(1, dtype=torch.bool))
    entries, payload = [before[0], entry], bytearray(before[1]) + data  # at an odd place
    check_entries(entries, len(payload), Limits())
    assert entry.codec == pb.RAW or entry.nbytes < tensor.nbytes
    return decode(entries, payload)["x"]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=150, deadline=None)
@given(tensors(), st.sampled_from([pb.RAW, pb.LOSSLESS]))
def test_lossless_is_lossless(tensor: torch.Tensor, codec: int) -> None:
    arrived = over_the_wire(tensor, codec)
    assert (arrived.shape, arrived.dtype) == (tensor.shape, tensor.dtype)
    assert bits(arrived) == bits(tensor)


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_lossless_is_smaller(dtype: torch.dtype) -> None:
    hidden = torch.randn(1, 4, 576, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = compress(hidden, pb.LOSSLESS)
    assert data is not None
    assert len(data) < 0.95 * hidden.nbytes
    assert bits(over_the_wire(hidden, pb.LOSSLESS)) == bits(hidden)


@settings(max_examples=100, deadline=None)
@given(tensors(), st.sampled_from([(pb.BF16, torch.bfloat16), (pb.F16, torch.float16)]))
def test_casts_round_to_nearest_or_do_nothing(tensor: torch.Tensor, cast: tuple[int, torch.dtype]) -> None:
    codec, dtype = cast
    narrow = tensor.to(dtype)
    arrived = over_the_wire(tensor, codec)
    if tensor.dtype.itemsize > 2 and narrow.isfinite().all():
        assert torch.equal(arrived, narrow.to(tensor.dtype))
    else:
        assert bits(arrived) == bits(tensor)


@settings(max_examples=100, deadline=None)
@given(tensors(specials=False))
def test_int8_is_off_by_half_a_scale(tensor: torch.Tensor) -> None:
    arrived = over_the_wire(tensor, pb.INT8).double()
    assert (arrived.shape, arrived.isfinite().all()) == (tensor.shape, True)
    if compress(tensor, pb.INT8) is None:
        assert torch.equal(arrived, tensor.double())
        return
    length = tensor.shape[-1] if tensor.ndim else 1
    epsilon = torch.finfo(tensor.dtype).eps  # of the result's own rounding
    step = torch.finfo(tensor.dtype).smallest_normal * epsilon  # between numbers that are subnormal
    for mine, theirs in zip(tensor.double().reshape(-1, length), arrived.reshape(-1, length), strict=True):
        for block, got in zip(mine.split(BLOCK), theirs.split(BLOCK), strict=True):
            sizes, order = block.abs().sort(descending=True)
            bound = sizes[1] / 127 / 2 * (1 + 2**-7) if len(block) > 1 else torch.tensor(0.0)
            errors = (block - got).abs()[order]
            assert errors[0] <= sizes[0] * (2**-8 + epsilon) + step
            assert (errors[1:] <= bound + sizes[1:] * epsilon + step + 1e-37).all()


def test_int8_with_what_is_not_finite_goes_raw() -> None:
    for value in (float("nan"), float("inf"), 3.4e38):
        hidden = torch.randn(2, 64)
        hidden[1, 5] = value
        assert encode("x", hidden, pb.INT8)[0].codec == pb.RAW


def test_int8_at_the_top_of_a_dtype_stays_finite() -> None:
    top = torch.full((1, 64), 65504.0, dtype=torch.float16)
    assert torch.equal(over_the_wire(top, pb.INT8)[0, 0], top[0, 0])
    assert over_the_wire(top, pb.INT8).isfinite().all()


def test_an_outlier_does_not_take_the_others_precision() -> None:
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    plain = (round_trip(hidden, pb.INT8) - hidden)[0].abs().amax()
    hidden[0, 7] = 24_723
    assert (round_trip(hidden, pb.INT8) - hidden)[0, 8:].abs().amax() < 1.5 * plain


@pytest.mark.parametrize("codec", NAMES)
def test_tokens_are_coded_by_themselves(codec: str) -> None:
    """A replay or a prompt in chunks gives the same hidden states."""
    hidden = torch.randn(2, 6, 100, generator=torch.Generator().manual_seed(0))
    parts = [round_trip(part, NAMES[codec]) for part in hidden.split(1, 1)]
    assert torch.equal(torch.cat(parts, 1), round_trip(hidden, NAMES[codec]))


# What no encoder writes

COUNT = 4096
ZEROS = zstandard.ZstdCompressor().compress(bytes(64 * 2**20))
"""2 KiB that would become 64 MiB."""
PLANE = zstandard.ZstdCompressor().compress(bytes(COUNT))


def with_size(frame: bytes, size: int) -> bytes:
    """A zstd frame that says to be of another size (RFC 8878, 3.1.1.1)."""
    descriptor = frame[4]
    at, width = 5 + (not descriptor & 0x20), (1, 2, 4, 8)[descriptor >> 6]
    return frame[:at] + (size - 256 * (width == 2)).to_bytes(width, "little") + frame[at + width :]


def split(*planes: bytes, lengths: tuple[int, ...] = ()) -> bytes:
    """A LOSSLESS float16 tensor."""
    return struct.pack("<2Q", *(lengths or map(len, planes))) + b"".join(planes)


RAW_PLANE = bytes(COUNT)
BROKEN = {
    "a bomb": split(RAW_PLANE, ZEROS),
    "a bomb that lies": split(RAW_PLANE, with_size(ZEROS, COUNT)),
    "a frame that lies": split(RAW_PLANE, with_size(PLANE, COUNT - 1)),
    "no size": split(RAW_PLANE, zstandard.ZstdCompressor(write_content_size=False).compress(RAW_PLANE)),
    "a shorter plane": split(RAW_PLANE, zstandard.ZstdCompressor().compress(bytes(COUNT - 1))),
    "a cut plane": split(RAW_PLANE, PLANE[:-3]),
    "something behind": split(RAW_PLANE, PLANE + PLANE),
    "garbage": split(RAW_PLANE, bytes(range(200))),
    "an empty plane": split(RAW_PLANE, b""),
    "lengths that overflow": split(RAW_PLANE, PLANE, lengths=(COUNT, 2**64 - 1)),
    "a longer plane": split(RAW_PLANE + b"x", PLANE),
    "a skippable frame": split(RAW_PLANE, b"\x50\x2a\x4d\x18" + struct.pack("<I", COUNT - 9) + bytes(COUNT - 9)),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_planes_are_refused(data: bytes) -> None:
    with bounded_memory(40), pytest.raises(BadRequest):
        received(data, pb.LOSSLESS, torch.float16, COUNT)


def received(data: bytes, codec: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    entry = encode("x", torch.empty(0, dtype=dtype))[0]
    entry = pb.Tensor(name="x", dtype=entry.dtype, shape=shape, codec=codec, nbytes=len(data))  # type: ignore[arg-type]
    check_entries([entry], len(data), Limits())
    return decode([entry], bytearray(data))["x"]


def test_what_broken_planes_would_be_if_they_were_not() -> None:
    assert torch.equal(received(split(RAW_PLANE, PLANE), pb.LOSSLESS, torch.float16, COUNT), torch.zeros(COUNT).half())


@pytest.mark.parametrize(("at", "wrong"), [(64, b"\x80\x7f"), (64, b"\xc0\x7f"), (66, b"\x80\xff"), (68, b"\x40")])
def test_broken_blocks_are_refused(at: int, wrong: bytes) -> None:
    """A scale and a largest value that are no numbers, and a place outside of the block."""
    data = bytearray(compress(torch.linspace(-1, 1, 64), pb.INT8) or b"")
    data[at : at + len(wrong)] = wrong
    with pytest.raises(BadRequest, match="scales that are no numbers, or places"):
        received(data, pb.INT8, torch.float32, 64)


# On a channel


def sent(message: Message, prepare: Callable[[Channel], Any] = lambda channel: None) -> tuple[int, Message]:
    """The bytes of a message, and what arrives."""

    async def send() -> tuple[int, Message]:
        near, far = connect("a", "b")
        sender = Channel(near, Limits(), 5)
        prepare(sender)
        await sender.send(message)
        size = len(far.pending)
        return size, await Channel(far, Limits(), 5).receive_request()

    return asyncio.run(send())


@pytest.mark.parametrize(("tokens", "is_aside"), [(1, False), (128, True)])
def test_only_much_is_coded_on_another_thread(monkeypatch: pytest.MonkeyPatch, tokens: int, is_aside: bool) -> None:
    threads = set[bool]()
    for name in ("encode_all", "decode"):
        real = getattr(channel_module, name)

        def noted(*args: Any, real: Callable[..., Any] = real) -> Any:
            threads.add(threading.current_thread() is not threading.main_thread())
            return real(*args)

        monkeypatch.setattr(channel_module, name, noted)
    hidden = torch.randn(1, tokens, 576)
    _, message = sent(Message(pb.Ping(), {"hidden_states": hidden}, {"hidden_states": pb.BF16}))
    assert torch.equal(message.tensor("hidden_states"), hidden.bfloat16().float())
    assert threads == {is_aside}


def test_who_lacks_a_codec_gets_raw() -> None:
    hidden = torch.randn(1, 4, 576)
    message = Message(pb.Ping(), {"hidden_states": hidden}, {"hidden_states": pb.INT8})
    size, arrived = sent(message, lambda channel: setattr(channel, "remote_codecs", frozenset({pb.RAW, pb.BF16})))
    assert size > hidden.nbytes
    assert torch.equal(arrived.tensor("hidden_states"), hidden)


def test_what_is_too_large_decoded_is_not_sent() -> None:
    message = Message(pb.Ping(), {"hidden_states": torch.randn(4, 64)}, {"hidden_states": pb.INT8})
    with pytest.raises(BadRequest, match="over the limit"):
        sent(message, lambda channel: setattr(channel, "remote_limit", 1000))


# With a peer


@pytest.mark.parametrize("name", [*NAMES, "one that nobody knows"])
def test_an_answer_comes_as_asked(wire: Wire, name: str) -> None:
    codec = NAMES.get(name, 99)
    assert wire.expected is not None
    expected = round_trip(wire.expected, codec) if name in NAMES else wire.expected
    for messages in ([forward(answer=codec)], [OPEN, step_message(1)]):
        if messages[0] is OPEN:
            messages[1].body.context.answer = codec  # type: ignore[attr-defined]
        assert torch.equal(wire.ask(*messages).tensor("hidden_states"), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_request_may_be_coded(wire: Wire, name: str) -> None:
    coded, plain = forward(), forward({"hidden_states": round_trip(HIDDEN, NAMES[name])})
    coded = Message(coded.body, coded.tensors, {"hidden_states": NAMES[name]})
    assert torch.equal(wire.ask(coded).tensor("hidden_states"), wire.ask(plain).tensor("hidden_states"))


# With a swarm

LOSSY = {"codec_out": "int8", "codec_back": "f16", "codec_gradients": "bf16"}
LOSSLESS = dict.fromkeys(LOSSY, "lossless")
BY_THE_CLIENT = {"hand_over_above": 1000.0}
"""What peers hand to each other is sent twice, and on a busy machine some do."""


def outcome(model: Any) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Logits of a step with a cache, loss and gradients, and bytes."""
    with counting() as traffic:
        inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(**inputs, use_cache=True).logits
        results = step(with_adapter(model))
    return logits, results, traffic.sent + traffic.received


def test_a_swarm_with_codecs(llama_swarm: tuple[Path, Swarm]) -> None:
    path, swarm = llama_swarm
    logits, results, most = outcome(swarm.connect(path, **BY_THE_CLIENT))
    same_logits, same_results, fewer = outcome(swarm.connect(path, **BY_THE_CLIENT, **LOSSLESS))
    assert torch.equal(same_logits, logits)
    assert_close(same_results, results)
    near_logits, near_results, fewest = outcome(swarm.connect(path, **BY_THE_CLIENT, **LOSSY))
    assert fewest < fewer < most
    assert 0 < (near_logits - logits).abs().max() < 0.05 * logits.abs().max()
    for mine, theirs in zip(near_results, results, strict=True):
        assert (mine - theirs).norm() < 0.05 * theirs.norm()


def test_a_codec_for_gradients_has_16_bits() -> None:
    with pytest.raises(BadUsage, match=r"codec_gradients .* should be 'none', 'bf16', 'f16' or 'lossless'"):
        SwarmConfig.make(None, initial_peers=["/ip4/127.0.0.1"], codec_gradients="int8")
