"""The targets `frames`, `introductions`, `records` and `seal`: what reads strangers' bytes before anything is done."""

import asyncio
import dataclasses
import hashlib
import json
import random
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import msgpack
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from bootstrap.addresses import check_announced, for_others, split_peer_address
from bootstrap.door import parse_announced
from bootstrap.identity import Identity, signer_of
from bootstrap.membership.seal import Nonces, Route, Sealed, SealedRequest, refusal_in
from bootstrap.storage import RecordStorage
from bootstrap.validator import MODELS_KEY, WEIGHTS_KEY, SignedRecords, complaints_key, model_key
from protocol import swarm_pb2 as pb
from protocol.adapters import Manifest
from protocol.channel import Channel
from protocol.codecs import SUPPORTED
from protocol.errors import BadAdapter, BadRequest, BadUsage, NotAMember, PeerUnreachable
from protocol.membership.refusals import Refused
from protocol.membership.secret import SwarmSecret
from protocol.records import (
    Accusation,
    Complaint,
    Door,
    ModelId,
    PeerRecord,
    SharedModel,
    Speed,
    Trainable,
    WeightsRecord,
)
from protocol.tensors import Limits, nbytes
from protocol.transport.dial_back import MAX_HOSTS, Answer, Attempt, DialBack, Outcome, Question
from protocol.transport.introduction import Credentials, identify, introduce
from protocol.weights.manifest import Manifest as Files
from tests.tools.fuzzing.carrier import connect
from tests.tools.fuzzing.choices import Choices, mutate_bytes, mutate_json
from tests.tools.fuzzing.messages import build_frame, mutate_fields, mutate_wire, to_bytes
from tests.tools.fuzzing.requests import Memory, pick_request
from tests.tools.spans import START
from tests.tools.wire import TARGET

_PEER = "QmZLpNtJqNU3utELa92YAA5urQkAyqcg1GjRDbEqbZWBhP"
_HASH = "0123456789abcdef" * 2
_SEEDS = 200


class Frames:
    """Bytes into a `Channel`: mutated requests, mutated headers, arbitrary bytes."""

    def __init__(self) -> None:
        self.inputs = 0
        self._loop = asyncio.new_event_loop()
        self._limits = Limits(max_header=2**16, max_payload=2**18, max_tensors=300)
        hello, numbers = pb.Hello(version=1, config_hash=_HASH, weights={"a": "b"}), random.Random(0)
        seeds = [pick_request(Choices(numbers.randbytes(40)), Memory(hello, number=2)) for _ in range(_SEEDS)]
        codecs = sorted(SUPPORTED)
        self._seeds = [build_frame(seed.body, seed.tensors, codecs[i % 5]) for i, seed in enumerate(seeds)]

    def play(self, data: bytes) -> None:
        """A few inputs. Raises for anything but a message within the limits or a refusal."""
        self._loop.run_until_complete(self._play(Choices(data)))

    def check(self) -> None:
        """Nothing is kept between inputs."""

    def close(self) -> None:
        """Close the loop."""
        self._loop.close()

    async def _play(self, choices: Choices) -> None:
        while not choices.is_over:
            self.inputs += 1
            await self._receive(choices)

    async def _receive(self, choices: Choices) -> None:
        near, far = connect("client", "peer")
        await near.send(self._bytes(choices), patience=None)
        near.close()
        try:
            message = await Channel(far, self._limits, 1.0).receive_request()
        except (BadRequest, PeerUnreachable):
            return
        assert nbytes(message.tensors) <= self._limits.max_payload
        for tensor in message.tensors.values():
            tensor.sum()  # every byte is there

    def _bytes(self, choices: Choices) -> bytes:
        what = choices.below(8)
        if what == 0:
            return choices.raw(choices.below(4096))
        if what == 1:
            header = choices.raw(choices.below(256))
            return struct.pack("<IQ", len(header), choices.below(64)) + header + bytes(64)
        seed, payload = choices.pick(self._seeds)
        header = pb.Frame.FromString(seed.SerializeToString())
        for _ in range(choices.below(4)):
            mutate_fields(choices, header)
        data = to_bytes(header.SerializeToString(), payload)
        return mutate_wire(choices, data) if what < 5 else data


class Introductions:
    """What a stranger says who calls directly, and what one says that it calls."""

    def __init__(self) -> None:
        self.inputs = 0
        self._loop = asyncio.new_event_loop()
        self._identities = [Identity.load_or_create(None) for _ in range(2)]
        self._caller, self._peer = (
            Credentials(one.peer_id, one.public_key, one.sign, signer_of) for one in self._identities
        )
        self._signature = self._caller.sign(b"what was said at another time")

    def play(self, data: bytes) -> None:
        """A few inputs. Raises for anything but a refusal, or acceptance of what is genuine."""
        self._loop.run_until_complete(self._play(Choices(data)))

    def check(self) -> None:
        """Who introduces itself is known as itself."""
        assert self._loop.run_until_complete(self._meet()) == self._caller.peer_id

    def close(self) -> None:
        """Delete the identities."""
        self._loop.close()
        for identity in self._identities:
            identity.close()

    async def _play(self, choices: Choices) -> None:
        while not choices.is_over:
            self.inputs += 1
            await (self._answer(choices) if choices.one_in(8) else self._say(choices))

    async def _meet(self) -> str:
        near, far = connect(self._caller.peer_id, self._peer.peer_id)
        calling = asyncio.create_task(introduce(near, self._caller, bytes(32), 1.0))
        peer_id = await identify(far, self._peer, bytes(32), 1.0)
        await calling
        return peer_id

    async def _say(self, choices: Choices) -> None:
        key = self._caller.public_key
        parts = [struct.pack("<HH", len(key), len(self._signature)), key, self._signature]
        said = choices.raw(choices.below(2500))
        if not choices.one_in(4):
            index = choices.below(3)
            parts[index] = mutate_bytes(choices, parts[index])
            said = b"".join(parts)
        near, far = connect("stranger", self._peer.peer_id)
        await near.send(said, patience=None)
        asyncio.get_running_loop().call_soon(near.close)
        with suppress(BadRequest, PeerUnreachable):
            raise AssertionError(f"taken for {await identify(far, self._peer, bytes(32), 1.0)}")

    async def _answer(self, choices: Choices) -> None:
        near, far = connect(self._caller.peer_id, "peer")
        await far.send(choices.raw(choices.below(64)), patience=None)
        asyncio.get_running_loop().call_soon(far.close)
        with suppress(PeerUnreachable):
            await introduce(near, self._caller, bytes(32), 1.0)


class _Parsers:
    """A target of several parsers, each tried by a function of its own."""

    _kinds: tuple[Callable[[Choices], None], ...]
    """As often as they are listed."""

    def __init__(self) -> None:
        self.inputs = 0

    def play(self, data: bytes) -> None:
        """A few inputs. Raises for anything but acceptance of what is genuine, or a refusal."""
        choices = Choices(data)
        while not choices.is_over:
            self.inputs += 1
            choices.pick(self._kinds)(choices)


async def _nowhere(peer_id: str) -> list[IPv4Address | IPv6Address]:
    return []


class Records(_Parsers):
    """Everything that is read of the directory: records, manifests, signed values, and what members store."""

    def __init__(self) -> None:
        super().__init__()
        self._identity = Identity.load_or_create(None)
        self._rules = SignedRecords(self._identity)
        self._storage = RecordStorage()
        self._loop = asyncio.new_event_loop()
        self._dial_back = DialBack(_nowhere, None)  # type: ignore[arg-type]
        model = ModelId(name="llama", config_hash=_HASH, num_blocks=5)
        peer = PeerRecord(
            peer_id=self._identity.peer_id, name="it", model=model, start=1, end=4, dtype="float32",
            quantization="none", addresses=("/ip4/192.0.2.1/tcp/1",), speed=Speed(decode=1.0, forward=2.0),
            free_cache_tokens=5, max_length=64, trainable=Trainable(row=9, tokens=99), version="1",
            direct=Door(fingerprint="0" * 64, addresses=(("192.0.2.1", 1), ("a.org", 2))),
        )  # fmt: skip
        accusation = Accusation(peer_id=_PEER, kind="step")
        complaint = Complaint(peer_id=self._identity.peer_id, model=model, accused=(accusation,))
        shared = SharedModel(model=model, manifest="0" * 64, held=5, wanted=9, rate=1.5)
        weights = WeightsRecord(peer_id=self._identity.peer_id, name="it", models=(shared,), direct=peer.direct)
        self._seeds = (peer, model, complaint, weights)
        keys = (model_key(_HASH), MODELS_KEY, complaints_key(_HASH), WEIGHTS_KEY)
        self._signed = [self._sign(key, record.to_bytes()) for key, record in zip(keys, self._seeds, strict=True)]
        assert all(map(self._rules.validate, self._signed))
        spec = {"name": "default", "method": "LORA", "options": {"r": 4, "rank_pattern": {TARGET: 2}}}
        spec |= {"targets": [TARGET], "parameters": [f"{START}.mlp.experts"]}
        names = {f"{TARGET}.lora_A.default.weight": 0}
        self._manifest = json.dumps(
            {"adapters": [spec], "scaling": {TARGET: {"default": 2.0}}, "tensors": names, "trainable": sorted(names)}
        )
        files = [
            {"name": name, "pieces": [[2, "0" * 64]], "digest": ""} for name in ("config.json", "model.safetensors")
        ]
        self._files = json.dumps({"files": files}, sort_keys=True, separators=(",", ":")).encode()
        self._kinds = (
            self._record, self._record, self._try_manifest, self._try_signed, self._store, self._try_content,
            self._try_files, self._try_dial_back,
        )  # fmt: skip

    def check(self) -> None:
        """Genuine records are still valid; forget what was stored, so that runs are alike."""
        assert all(map(self._rules.validate, self._signed))
        self._storage = RecordStorage()

    def close(self) -> None:
        """Delete the identity."""
        self._identity.close()
        self._loop.close()

    def _record(self, choices: Choices) -> None:
        seed = choices.pick(self._seeds)
        data = _json_bytes(choices, seed.to_bytes())
        with suppress(BadRequest):
            record = type(seed).from_bytes(data)
            assert type(seed).from_bytes(record.to_bytes()) == record

    def _try_manifest(self, choices: Choices) -> None:
        with suppress(BadAdapter):
            Manifest.from_json(_json_bytes(choices, self._manifest.encode()).decode(errors="replace")).config_key()

    def _try_files(self, choices: Choices) -> None:
        """The manifest of a model's files: what is taken for one is written as one."""
        data = _json_bytes(choices, self._files)
        with suppress(BadRequest):
            manifest = Files.from_bytes(data, hashlib.sha256(data).hexdigest())
            assert manifest.data == data
            assert all(Path(name).name == name for name in manifest.numbers)
            assert [manifest.covering(piece.file, piece.start, piece.end) for piece in manifest.pieces] == [
                [number] for number in range(len(manifest.pieces))
            ]

    def _try_dial_back(self, choices: Choices) -> None:
        """Questions of members that are connected from nowhere, and answers."""
        question = Question(port=7, door=8, fingerprint="0" * 64).to_bytes()
        told = self._loop.run_until_complete(self._dial_back.answer(_PEER, _json_bytes(choices, question)))
        assert told in (b"", Answer().to_bytes())
        attempt = Attempt(host="192.0.2.1", carrier="direct", outcome=Outcome.SILENT)
        with suppress(BadRequest):
            answer = Answer.from_bytes(_json_bytes(choices, Answer(attempts=(attempt,) * 2).to_bytes()))
            assert len(answer.attempts) <= 2 * MAX_HOSTS

    def _try_signed(self, choices: Choices) -> None:
        """A genuine record that has been changed: whatever differs, it is no longer valid."""
        genuine = choices.pick(self._signed)
        field = choices.pick(("value", "key", "subkey", "expiration_time"))
        old: Any = getattr(genuine, field)
        new = choices.scalar() if field == "expiration_time" else mutate_bytes(choices, old)
        changed = DHTRecord(**(dataclasses.asdict(genuine) | {field: new}))
        if self._rules.validate(changed):
            same = msgpack.unpackb(changed.value) == msgpack.unpackb(genuine.value)
            assert dataclasses.replace(changed, value=b"") == dataclasses.replace(genuine, value=b"")
            assert same, "a forged record was accepted"
            self._rules.strip_value(changed)

    def _try_content(self, choices: Choices) -> None:
        """Whatever a member signs for itself: it can be taken apart, or it is refused."""
        index = choices.below(len(self._seeds))
        content = _json_bytes(choices, self._seeds[index].to_bytes())
        payload = mutate_bytes(choices, msgpack.packb(content)) if choices.one_in(8) else msgpack.packb(content)
        unsigned = dataclasses.replace(self._signed[index], value=payload)
        # Signing takes 1 ms, so the signature is mostly another's: what comes before it is what is tried.
        value = msgpack.packb([self._identity.public_key, bytes(256), payload])
        if choices.one_in(64):
            value = self._rules.sign_value(unsigned)
        record = dataclasses.replace(unsigned, value=value)
        if self._rules.validate(record):
            msgpack.unpackb(self._rules.strip_value(record))

    def _store(self, choices: Choices) -> None:
        expiration = time.time() + choices.pick((1.0, 60.0, 599.0, 601.0, -1.0, float("nan"), float("inf"), 1e308))
        subkey = choices.pick((None, "a", "b", str(choices.below(1000))))
        key = DHTID.generate(source=choices.pick(("a", "b")))
        self._storage.store(key, bytes(choices.below(2048)), expiration, subkey)
        found = self._storage.get(key)
        assert (found is not None) == (key in self._storage)

    def _sign(self, key: str, content: bytes) -> DHTRecord:
        subkey, payload = msgpack.packb(self._identity.peer_id), msgpack.packb(content)
        record = DHTRecord(DHTID.generate(source=key).to_bytes(), subkey, payload, 1e10)
        return dataclasses.replace(record, value=self._rules.sign_value(record))


class Seals(_Parsers):
    """Sealed requests and answers of the directory, addresses."""

    def __init__(self) -> None:
        super().__init__()
        self._secret = SwarmSecret(bytes(range(32)))
        self._route = Route("DHT.rpc_find", PeerID.from_base58(_PEER), PeerID(bytes(range(34))))
        self._seen = Nonces()
        self._kinds = (self._try_request, self._try_request, self._try_answer, self._try_address)

    def check(self) -> None:
        """Nonces do not pile up: those of old requests are forgotten."""
        self._seen.add(b"", 1e9 + 61.0 * self.inputs)
        assert len(self._seen._until) == 1

    def close(self) -> None:
        """Nothing is kept."""

    def _try_request(self, choices: Choices) -> None:
        now = 1e9 + 61.0 * self.inputs
        inside = Sealed(choices.raw(choices.below(40)), choices.raw(choices.below(40)))
        genuine = SealedRequest.seal(self._secret, self._route, inside, now).to_bytes()
        data = mutate_bytes(choices, genuine)
        with suppress(Refused):
            opened = SealedRequest.open(self._secret, self._route, data, now, self._seen)
            assert (data, opened.inside) == (genuine, inside)

    def _try_answer(self, choices: Choices) -> None:
        request = SealedRequest.seal(self._secret, self._route, Sealed(b"who", b"what"), 1e9)
        genuine = request.seal_answer(Sealed(b"they", b"that"))
        data = mutate_bytes(choices, choices.pick((genuine, b"\x07hivetune no 2\x01")))
        if refusal_in(data) is None:
            with suppress(NotAMember):
                assert request.open_answer(data).body == b"that"
                assert data == genuine
        with suppress(Refused):
            Sealed.from_bytes(data)

    def _try_address(self, choices: Choices) -> None:
        address = choices.pick((f"/ip4/192.0.2.1/tcp/1/p2p/{_PEER}", f"/dns4/a.org/tcp/1/p2p/{_PEER}",
                                f"/ip6/::1/udp/5/quic/p2p/{_PEER}"))  # fmt: skip
        text = mutate_bytes(choices, address.encode()).decode(errors="surrogateescape")
        with suppress(BadUsage):
            check_announced(text, _PEER)
        with suppress(BadUsage):
            parse_announced(text.partition("/p2p/")[0])
        with suppress(BadUsage):
            peer_id, location = split_peer_address(text)
            for_others([location], peer_id.to_base58())
            Multiaddr(str(location))


def _json_bytes(choices: Choices, text: bytes) -> bytes:
    """Something that may look like a record."""
    if choices.one_in(4):
        return mutate_bytes(choices, text)
    if choices.one_in(16):
        return choices.pick((b"[", b'{"model":')) * choices.below(5000)
    return mutate_json(choices, text.decode()).encode(errors="surrogatepass")
