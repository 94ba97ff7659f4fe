"""What a hostile or broken client may send to a peer: it is told, and the peer serves on."""

import asyncio
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message as ProtoMessage

from bootstrap.member import Member, MemberOptions
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.errors import (
    BadAdapter,
    BadRequest,
    PeerUnreachable,
    SessionLost,
    SwarmError,
    TooLong,
    UnknownCall,
    WrongModel,
)
from protocol.tensors import Limits
from tests.tools.spans import END, START, WIDTH
from tests.tools.swarm import ForkServer
from tests.tools.wire import HIDDEN, MAX_LENGTH, MIB, OPEN, TARGET, Wire, context, forward, open_wire, step

# Frames that are none. The peer says what is wrong with them, and ends the stream: it is out of step.


def frame(header: bytes, payload: int, *, header_length: int | None = None) -> bytes:
    return struct.pack("<IQ", len(header) if header_length is None else header_length, payload) + header


def described(*tensors: pb.Tensor, payload: int = 0) -> bytes:
    body = pb.Forward(context=context())
    return frame(pb.Frame(forward=body, tensors=tensors).SerializeToString(), payload)


def entry(name: str = "hidden_states", dtype: int = pb.FLOAT32, **fields: Any) -> pb.Tensor:
    return pb.Tensor(**({"name": name, "dtype": dtype, "shape": [1], "nbytes": 4} | fields))


def nothings(count: int) -> list[pb.Tensor]:
    return [entry(str(i), shape=[0], nbytes=0) for i in range(count)]


FRAMES = {
    "a huge header": (frame(b"", 0, header_length=2**32 - 1), "over the limit"),
    "a huge payload": (frame(b"", 2**63), "over the limit"),
    "garbage": (frame(bytes(range(255, 0, -1)), 0), "not a valid message"),
    "text": (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "over the limit"),
    "a name that is no text": (frame(b"\x82\x01\x03\x0a\x01\xff", 0), "not a valid message"),
    "nothing": (frame(b"", 0), "without a body"),
    "an unknown body": (frame(b"\xea\x01\x00", 0), "without a body"),
    "more bytes than its tensors": (described(entry(), payload=8), "announces 8 bytes"),
    "fewer bytes than its tensors": (described(entry(), entry("b"), payload=4), "announces 4 bytes"),
    "bytes that are not its shape's": (described(entry(nbytes=8), payload=8), "is not 8 bytes"),
    "a shape that overflows": (described(entry(shape=[2**32, 2**32], nbytes=0)), "elements"),
    "a huge empty shape": (described(entry(shape=[2**32, 2**32, 0], nbytes=0)), "elements"),
    "nine dimensions": (described(entry(shape=[1] * 9), payload=4), "9 dimensions"),
    "no dtype": (described(entry(dtype=pb.DTYPE_NONE), payload=4), "no dtype"),
    "an unknown dtype": (described(entry(dtype=77), payload=4), "dtype number 77"),
    "an unknown codec": (described(entry(codec=5), payload=4), "unknown codec"),
    "a codec of other dtypes": (described(entry(dtype=pb.INT64, codec=pb.INT8, nbytes=6), payload=6), "is not for"),
    "a codec that gains nothing": (
        described(entry(dtype=pb.FLOAT16, codec=pb.BF16, nbytes=2), payload=2),
        "is not for",
    ),
    "bytes that are not its codec's": (described(entry(codec=pb.BF16), payload=4), "is not 4 bytes under BF16"),
    "what is lossless and longer": (described(entry(codec=pb.LOSSLESS), payload=4), "under LOSSLESS"),
    "a few bytes for many": (
        described(entry(shape=[10**6], codec=pb.LOSSLESS, nbytes=99), payload=99),
        "under LOSSLESS",
    ),
    "more than a payload when decoded": (
        described(
            *(entry(str(i), shape=[2**26], codec=pb.LOSSLESS, nbytes=2**24) for i in range(3)), payload=3 * 2**24
        ),
        "decoded, over the limit",
    ),
    "a name twice": (described(entry(), entry(), payload=8), "repeated"),
    "more tensors than a call has": (described(*nothings(1025)), "1025 tensors; one of its kind has at most 1024"),
    "more than an adapter has": (
        frame(pb.Frame(put_adapter=pb.PutAdapter(), tensors=nothings(50_001)).SerializeToString(), 0),
        "50001 tensors; one of its kind has at most 50000",
    ),
    "tensors of a ping's": (frame(pb.Frame(ping=pb.Ping(), tensors=nothings(2)).SerializeToString(), 0), "at most 1"),
    "a tensor of none's": (
        frame(pb.Frame(open_session=pb.OpenSession(), tensors=nothings(1)).SerializeToString(), 0),
        "at most 0",
    ),
}


@pytest.mark.parametrize(("raw", "said"), FRAMES.values(), ids=FRAMES)
def test_a_malformed_frame_is_refused(wire: Wire, raw: bytes, said: str) -> None:
    async def send() -> None:
        channel = await wire.greeted()
        await channel.stream.send(raw, patience=5)
        with pytest.raises(BadRequest, match=said):
            await channel.receive_answer()
        with pytest.raises(PeerUnreachable):
            await channel.call(forward())

    wire.run(send())


def test_memory_is_taken_as_bytes_come_not_as_announced(wire: Wire) -> None:
    claim = entry(shape=[100, MIB], nbytes=400 * MIB)

    async def announce() -> list[Channel]:
        channels = [await wire.greeted() for _ in range(3)]
        for channel in channels:
            await channel.stream.send(described(claim, payload=400 * MIB), bytes(MIB), patience=5)
        await asyncio.sleep(0.5)
        return channels

    before = wire.peer.rss()
    channels = wire.run(announce())
    assert wire.peer.rss() - before < 50 * MIB
    for channel in channels:
        channel.close()


def test_others_do_not_wait_for_whoever_sends_many_entries(wire: Wire) -> None:
    """They weigh nothing, and take long to read."""
    many = frame(pb.Frame(put_adapter=pb.PutAdapter(), tensors=nothings(40_000)).SerializeToString(), 0)

    async def flood(channel: Channel) -> None:
        await channel.stream.send(many, patience=5)
        with pytest.raises(BadAdapter):
            await channel.receive_answer()
        channel.close()

    async def ping() -> list[float]:
        channel, *greedy = [await wire.greeted() for _ in range(3)]
        floods = asyncio.gather(*map(flood, greedy))
        waits = []
        while not floods.done():
            began = time.perf_counter()
            await channel.call(Message(pb.Ping()))
            waits.append(time.perf_counter() - began)
        await floods
        channel.close()
        return sorted(waits)

    waits = wire.run(ping())
    assert waits[len(waits) // 2] < 0.2


def test_a_client_does_not_send_what_is_over_the_limit(wire: Wire) -> None:
    async def send() -> None:
        channel = await wire.greeted()
        channel.remote_limit = 100
        with pytest.raises(BadRequest, match="send fewer tokens"):
            await channel.send(forward())
        channel.close()

    wire.run(send())


# Greeting


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"version": VERSION + 1}, BadRequest, f"version {VERSION + 1}, this peer {VERSION}"),
        ({"config_hash": "0" * 32}, WrongModel, "of another configuration"),
        ({"config_hash": "\x00 no hash"}, WrongModel, "of another configuration"),
        ({"weights": {"model.safetensors.index.json": "0" * 32}}, WrongModel, "same revision"),
        ({"weights": {"other.safetensors": "0" * 32}}, WrongModel, "same revision"),
        ({"weights": {}}, WrongModel, "same revision"),
    ],
)
def test_a_client_of_something_else_is_told(
    wire: Wire, change: dict[str, Any], error: type[SwarmError], said: str
) -> None:
    fields = {"version": VERSION, "config_hash": wire.hello.config_hash, "weights": dict(wire.hello.weights)}
    assert greeting_refused(wire, pb.Hello(**(fields | change)), error).find(said) >= 0


@pytest.mark.parametrize("body", [pb.Ping(), pb.Forward(context=context()), pb.Welcome()])
def test_a_stream_begins_with_a_hello(wire: Wire, body: ProtoMessage) -> None:
    assert "must begin with a Hello" in greeting_refused(wire, body, BadRequest)


def greeting_refused(wire: Wire, body: ProtoMessage, error: type[SwarmError]) -> str:
    async def greet() -> str:
        channel = await wire.open()
        with pytest.raises(error) as caught:
            await channel.call(Message(body))
        with pytest.raises(PeerUnreachable):
            await channel.call(forward())
        return str(caught.value)

    return wire.run(greet())


# Calls


FLOATS = torch.zeros(1, 2, 3, 8)
BAD_TENSORS = {
    "nothing": ({"x": HIDDEN}, "without its tensor 'hidden_states'"),
    "two dimensions": ({"hidden_states": HIDDEN[0]}, "expected floats of shape"),
    "no dimension": ({"hidden_states": torch.tensor(1.0)}, "expected floats of shape"),
    "another width": ({"hidden_states": HIDDEN[..., :31]}, "expected floats of shape"),
    "integers": ({"hidden_states": HIDDEN.long()}, "torch.int64"),
    "no token": ({"hidden_states": HIDDEN[:, :0]}, "expected floats of shape"),
    "no row": ({"hidden_states": HIDDEN[:0]}, "expected floats of shape"),
    "many rows": ({"hidden_states": HIDDEN[:, :1].expand(5000, 1, WIDTH)}, "5000 rows"),
    "a mask of floats": ({"attention_mask": torch.ones(1, 4)}, "attention_mask is torch.float32"),
    "a short mask": ({"attention_mask": torch.ones(1, 3).long()}, r"expected integers of shape \[1, 4\]"),
    "a mask of three dimensions": ({"attention_mask": torch.ones(1, 4, 4).long()}, "expected integers of shape"),
    "positions of another batch": ({"position_ids": torch.ones(2, 4).long()}, "expected integers of shape"),
    "positions of floats": ({"position_ids": torch.ones(1, 4)}, "position_ids is torch.float32"),
    "positions of truths": ({"position_ids": torch.ones(1, 4).bool()}, "position_ids is torch.bool"),
    "a prefix of one block": ({"prefix.1.key": FLOATS, "prefix.1.value": FLOATS}, "each of blocks 1:4"),
    "a prefix of keys": ({f"prefix.{i}.key": FLOATS for i in range(1, 4)}, "each of blocks 1:4"),
    "a flat prefix": ({"prefix.1.key": FLOATS[0]}, "4-D"),
    "a prefix of another batch": ({"prefix.1.key": FLOATS.expand(2, 2, 3, 8)}, "batch 1"),
}


@pytest.mark.parametrize(("tensors", "said"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_call_with_wrong_tensors_is_refused(wire: Wire, tensors: dict[str, torch.Tensor], said: str) -> None:
    given = tensors if "x" in tensors else {"hidden_states": HIDDEN, **tensors}
    with pytest.raises(BadRequest, match=said):
        wire.ask(forward(given))
    with pytest.raises(BadRequest, match=said):
        wire.ask(OPEN, Message(pb.Step(context=context(), number=1), given))
    with pytest.raises(BadRequest, match=said):
        wire.ask(Message(pb.Backward(context=context()), {"grad": HIDDEN, **given}))


def test_a_prefix_of_another_shape_is_survived(wire: Wire) -> None:
    lengths = {f"prefix.{i}.{part}": torch.zeros(1, 2, 2 + i, 8) for i in range(1, 4) for part in ("key", "value")}
    with pytest.raises(BadRequest, match="differ in length"):
        wire.ask(forward({"hidden_states": HIDDEN, **lengths}))


@pytest.mark.parametrize("shape", [(1, 3, 3, 8), (1, 2, 3, 7), (1, 0, 3, 8), (1, 1000, 3, 8)])
def test_a_prefix_with_other_heads_is_refused(wire: Wire, shape: tuple[int, ...]) -> None:
    given = {f"prefix.{i}.{part}": torch.zeros(shape) for i in range(1, 4) for part in ("key", "value")}
    with pytest.raises(BadRequest, match="heads of other sizes"):
        wire.ask(forward({"hidden_states": HIDDEN, **given}))
    with pytest.raises(BadRequest, match="heads of other sizes"):
        wire.ask(OPEN, step(1, **given))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 0}, "Blocks 0:4 were asked of a peer that serves 1:4"),
        ({"end": 5}, "Blocks 1:5"),
        ({"start": 2, "end": 2}, "Blocks 2:2"),
        ({"start": 3, "end": 2}, "Blocks 3:2"),
        ({"start": 2**32 - 1, "end": 2**32 - 1}, "were asked"),
        ({"autocast": pb.FLOAT32}, "Autocast to torch.float32"),
        ({"autocast": pb.BOOL}, "Autocast to torch.bool"),
        ({"autocast": 99}, "dtype number 99"),
    ],
)
def test_a_call_in_a_wrong_context_is_refused(wire: Wire, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        wire.ask(forward(**options))


def test_a_call_or_session_that_is_too_long_is_refused(wire: Wire) -> None:
    with pytest.raises(TooLong, match=f"allows .{MAX_LENGTH}"):
        wire.ask(forward({"hidden_states": torch.zeros(1, MAX_LENGTH + 1, WIDTH)}))
    with pytest.raises(TooLong, match=f"allows .{MAX_LENGTH}"):
        wire.ask(OPEN, step(1, hidden=torch.zeros(1, MAX_LENGTH, WIDTH)), step(2, hidden=HIDDEN[:, :1]))


@pytest.mark.parametrize("body", [pb.Welcome(), pb.Result(), pb.Hello(), pb.Working()])
def test_messages_that_are_no_requests_are_refused(wire: Wire, body: ProtoMessage) -> None:
    with pytest.raises(BadRequest, match=f"does not answer {type(body).__name__}"):
        wire.ask(Message(body))


def test_backward_needs_what_its_forward_was(wire: Wire) -> None:
    call_id = 0

    async def keep_and_go_back(grad: torch.Tensor) -> Message:
        nonlocal call_id
        channel = await wire.greeted()
        try:
            call_id = (await channel.call(forward(keep=True))).body.call_id  # type: ignore[attr-defined]
            assert call_id
            return await channel.call(Message(pb.Backward(context=context(), call_id=call_id), {"grad": grad}))
        finally:
            channel.close()

    assert wire.run(keep_and_go_back(HIDDEN)).tensor("grad.hidden_states").shape == HIDDEN.shape
    for grad in (HIDDEN[:, :2], HIDDEN.expand(2, 4, WIDTH), HIDDEN.long(), HIDDEN[0]):
        with pytest.raises(BadRequest, match="grad"):
            wire.run(keep_and_go_back(grad))
    for number in (1, call_id, 2**64 - 1):
        with pytest.raises(UnknownCall, match="forward's inputs"):
            wire.ask(Message(pb.Backward(context=context(), call_id=number), {"grad": HIDDEN}))
    with pytest.raises(BadRequest, match="'grad'"):
        wire.ask(Message(pb.Backward(context=context(), call_id=1)))
    with pytest.raises(BadRequest, match="differ in shape"):
        wire.ask(Message(pb.Backward(context=context()), {"grad": HIDDEN[:, :2], "hidden_states": HIDDEN}))


def test_what_was_kept_for_a_client_goes_with_it(wire: Wire) -> None:
    large = forward({"hidden_states": torch.ones(32, MAX_LENGTH, WIDTH)}, keep=True)
    assert wire.ask(large).body.call_id  # type: ignore[attr-defined]
    before = wire.peer.rss()
    for _ in range(12):
        wire.ask(large)
    assert wire.peer.rss() - before < 60 * MIB


def test_a_client_cannot_use_what_is_kept_for_another(wire: Wire) -> None:
    async def steal() -> None:
        owner = await wire.greeted()
        call_id = (await owner.call(forward(keep=True))).body.call_id  # type: ignore[attr-defined]
        backward = Message(pb.Backward(context=context(), call_id=call_id), {"grad": HIDDEN})
        other = await Member.join(MemberOptions((wire.peer.address,), client_mode=True))
        try:
            thief = Channel(await other.transport.connect(wire.peer.peer_id), Limits(), 10)
            await thief.call(Message(wire.hello))
            with pytest.raises(UnknownCall):
                await thief.call(backward)
        finally:
            await other.shutdown()
        assert "grad.hidden_states" in (await owner.call(backward)).tensors
        owner.close()

    wire.run(steal())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"names": ["0.self_attn.q_proj.weight"]}, "no weight matrix of blocks 1:4"),
        ({"names": ["1.self_attn.q_proj.bias"]}, "no weight matrix"),
        ({"names": ["1.input_layernorm.weight"]}, "no weight matrix"),
        ({"names": ["embed_tokens.weight"]}, "no weight matrix"),
        ({"names": ["²..weight"]}, "no weight matrix"),
        ({"names": [""]}, "no weight matrix"),
        ({"names": ["1.__class__.weight"]}, "no weight matrix"),
        ({"norm_dims": []}, "Norms of a matrix"),
        ({"norm_dims": [2]}, "Norms of a matrix"),
        ({"norm_dims": [0, -2]}, "Norms of a matrix"),
        ({"dtype": pb.INT64}, "needs a floating dtype"),
        ({"dtype": pb.DTYPE_NONE}, "needs a floating dtype"),
        ({"names": [f"{TARGET}.weight"] * 5000}, "at most 4096 names"),
    ],
)
def test_weights_that_are_none_cannot_be_asked_for(wire: Wire, fields: dict[str, Any], said: str) -> None:
    good = {"names": [f"{TARGET}.weight"], "norm_dims": [1], "dtype": pb.FLOAT32}
    assert wire.ask(Message(pb.ReadWeight(**good))).tensor("value.0").shape == (32,)
    with pytest.raises(BadRequest, match=said):
        wire.ask(Message(pb.ReadWeight(**(good | fields))))


# Sessions


def test_a_step_needs_a_session(wire: Wire) -> None:
    for message in (step(1), Message(pb.ForkSession())):
        with pytest.raises(BadRequest, match="open one first"):
            wire.ask(message)


@pytest.mark.parametrize("number", [0, 2, 7, 2**64 - 1])
def test_steps_come_in_order(wire: Wire, number: int) -> None:
    with pytest.raises(BadRequest, match="expected 1"):
        wire.ask(OPEN, step(number))
    if number != 2:
        with pytest.raises(BadRequest, match="expected 2"):
            wire.ask(OPEN, step(1), step(number))


def test_a_repeated_step_is_answered_again_not_run_again(wire: Wire) -> None:
    def last(*messages: Message) -> torch.Tensor:
        return wire.ask(OPEN, *messages).tensor("hidden_states")

    once = last(step(1), step(2, hidden=HIDDEN[:, :1]))
    assert torch.equal(last(step(1), step(1), step(2, hidden=HIDDEN[:, :1])), once)
    assert torch.equal(last(step(1), step(2, hidden=HIDDEN[:, :1]), step(2, hidden=HIDDEN[:, 1:2])), once)
    assert torch.equal(last(step(1)), wire.expected)


def test_a_large_answer_is_not_kept(fork_server: ForkServer, models: Callable[[str], Path]) -> None:
    large, small = torch.zeros(150, MAX_LENGTH - 1, WIDTH), torch.zeros(150, 1, WIDTH)
    assert large.nbytes > MIB
    with open_wire(fork_server, models("llama"), "--cache-tokens", "16384") as wire:
        with pytest.raises(SessionLost, match="too large to be kept"):
            wire.ask(OPEN, step(1, hidden=large), step(1, hidden=large))
        later = [step(1, hidden=large), step(2, hidden=small), step(2, hidden=small)]
        assert wire.ask(OPEN, *later).tensor("hidden_states").shape == small.shape


@pytest.mark.parametrize("body", [{"start": 0, "end": 4}, {"start": 2, "end": 2}, {"start": 1, "end": 9}])
def test_a_session_needs_blocks_of_the_peer(wire: Wire, body: dict[str, int]) -> None:
    with pytest.raises(BadRequest, match="were asked"):
        wire.ask(Message(pb.OpenSession(**body)))


def test_a_session_keeps_its_blocks_and_rows(wire: Wire) -> None:
    other = Message(pb.Step(context=context(start=2), number=2), {"hidden_states": HIDDEN})
    with pytest.raises(BadRequest, match="blocks cannot change"):
        wire.ask(OPEN, step(1), other)
    with pytest.raises(BadRequest, match="2 rows, its session 1"):
        wire.ask(OPEN, step(1), step(2, hidden=HIDDEN.expand(2, 4, WIDTH)))
    with pytest.raises(BadRequest, match="no such forked session"):
        wire.ask(Message(pb.OpenSession(start=START, end=END, fork_of=bytes(16))))


def rows(*index: int) -> pb.IndexList:
    return pb.IndexList(index=index)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (pb.CacheEdit(crop=5), "Cannot crop 5 tokens from a cache of 4"),
        (pb.CacheEdit(crop=2**64 - 1), "Cannot crop"),
        (pb.CacheEdit(reorder=rows(1)), "does not fit a batch of 1"),
        (pb.CacheEdit(reorder=rows(0, 0)), "does not fit a batch of 1"),
        (pb.CacheEdit(reorder=rows()), "does not fit"),
        (pb.CacheEdit(select=rows(2**32 - 1)), "does not fit"),
        (pb.CacheEdit(select=rows()), "does not fit"),
        (pb.CacheEdit(select=rows(*([0] * 5000))), "does not fit"),
        (pb.CacheEdit(repeat_interleave=0), "Cannot repeat"),
        (pb.CacheEdit(repeat_interleave=2**32 - 1), "Cannot repeat"),
        (pb.CacheEdit(), "unknown cache edit"),
    ],
)
def test_edits_must_fit_the_cache(wire: Wire, edit: pb.CacheEdit, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        wire.ask(OPEN, step(1), step(2, edit))


def test_edits_cannot_take_more_memory_than_sessions_may(wire: Wire) -> None:
    long = step(1, hidden=torch.zeros(1, MAX_LENGTH, WIDTH))
    for edit in (pb.CacheEdit(repeat_interleave=4096), pb.CacheEdit(select=rows(*([0] * 4096)))):
        with pytest.raises(SwarmError, match="of 1024 tokens free"):
            wire.ask(OPEN, long, step(2, edit, pb.CacheEdit(crop=MAX_LENGTH), hidden=HIDDEN[:, :1].expand(4096, 1, -1)))


def test_a_refused_step_leaves_its_session_as_it_was(wire: Wire) -> None:
    async def ask() -> tuple[torch.Tensor, torch.Tensor]:
        outputs = []
        for refused in (False, True):
            channel = await wire.greeted()
            await channel.call(OPEN)
            await channel.call(step(1))
            if refused:
                with pytest.raises(BadRequest, match="expected floats"):
                    await channel.call(step(2, pb.CacheEdit(crop=2), hidden=HIDDEN[..., :31]))
            outputs.append((await channel.call(step(2, pb.CacheEdit(crop=1)))).tensor("hidden_states"))
            channel.close()
        return outputs[0], outputs[1]

    assert torch.equal(*wire.run(ask()))


def test_a_step_has_so_many_edits(wire: Wire) -> None:
    with pytest.raises(BadRequest, match="257 cache edits; at most 256"):
        wire.ask(OPEN, step(1), step(2, *[pb.CacheEdit(crop=0)] * 257))
