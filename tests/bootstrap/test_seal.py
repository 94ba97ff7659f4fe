"""The seal that a swarm's secret sets on the DHT's requests. No p2pd, no model."""

from dataclasses import replace

import pytest
from hivemind.p2p import PeerID

from bootstrap.membership.seal import (
    WINDOW,
    Nonces,
    Route,
    Sealed,
    SealedRequest,
    refusal_answer,
    refusal_in,
)
from protocol.errors import NotAMember
from protocol.membership.refusals import Refusal, Refused
from protocol.membership.secret import SwarmSecret

ALICE, BOB, MALLORY = (PeerID(b"\x12\x20" + bytes([number]) * 32) for number in (1, 2, 3))
ROUTE = Route("DHTProtocol.rpc_find", ALICE, BOB)
NOW = 1.8e9
OURS, THEIRS = (SwarmSecret(bytes([number]) * 32) for number in (1, 2))
INSIDE = Sealed(b"certificate", b"request")


def refused(
    data: bytes,
    route: Route = ROUTE,
    secret: SwarmSecret = OURS,
    now: float = NOW,
    seen: Nonces | None = None,
) -> Refusal:
    with pytest.raises(Refused) as caught:
        SealedRequest.open(secret, route, data, now, seen or Nonces())
    assert refusal_in(refusal_answer(caught.value.why)) == caught.value.why
    return caught.value.why


def test_a_sealed_request_holds_for_one_method_sender_receiver_and_time() -> None:
    data = SealedRequest.seal(OURS, ROUTE, INSIDE, NOW).to_bytes()
    for now in (NOW - WINDOW, NOW, NOW + WINDOW):
        assert SealedRequest.open(OURS, ROUTE, data, now, Nonces()).inside == INSIDE
    for change in ({"method": "DHTProtocol.rpc_store"}, {"sender": MALLORY}, {"receiver": MALLORY}):
        assert refused(data, replace(ROUTE, **change)) is Refusal.OTHER_SWARM
    assert refused(data, secret=THEIRS) is Refusal.OTHER_SWARM
    for now in (NOW - WINDOW - 1, NOW + WINDOW + 1):
        assert refused(data, now=now) is Refusal.CLOCKS_DIFFER
    for sent in (float("nan"), float("inf")):
        assert refused(SealedRequest.seal(OURS, ROUTE, INSIDE, sent).to_bytes()) is Refusal.CLOCKS_DIFFER


def test_every_byte_of_a_request_counts() -> None:
    data = SealedRequest.seal(OURS, ROUTE, INSIDE, NOW).to_bytes()
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        assert refused(changed) in (Refusal.STRANGER, Refusal.OTHER_SWARM)
        assert refused(data[:place]) in (Refusal.STRANGER, Refusal.OTHER_SWARM)
    assert refused(data + b"x") is Refusal.OTHER_SWARM


def test_a_request_is_taken_once() -> None:
    seen = Nonces()
    ahead = SealedRequest.seal(OURS, ROUTE, INSIDE, NOW + WINDOW).to_bytes()
    SealedRequest.open(OURS, ROUTE, ahead, NOW, seen)
    for later in (0, 1, WINDOW, 2 * WINDOW):
        assert refused(ahead, now=NOW + later, seen=seen) is Refusal.REPEATED
    assert refused(ahead, now=NOW + 2 * WINDOW + 1, seen=seen) is Refusal.CLOCKS_DIFFER
    for number in range(1000):
        SealedRequest.open(
            OURS, ROUTE, SealedRequest.seal(OURS, ROUTE, INSIDE, NOW + number).to_bytes(), NOW + number, seen
        )
    assert len(seen._until) < 3 * WINDOW


def test_an_answer_holds_for_one_request() -> None:
    asked, other = (SealedRequest.seal(OURS, ROUTE, INSIDE, NOW) for _ in range(2))
    answer = SealedRequest.open(OURS, ROUTE, asked.to_bytes(), NOW, Nonces()).seal_answer(Sealed(b"theirs", b"answer"))
    assert asked.open_answer(answer) == Sealed(b"theirs", b"answer")
    for request, data in (
        (other, answer),
        (asked, answer + b"x"),
        (asked, b"answer"),
        (asked, b""),
        (asked, answer[:40]),
    ):
        with pytest.raises(NotAMember, match="is no member of this swarm"):
            request.open_answer(data)
    with pytest.raises(NotAMember):
        asked.open_answer(asked.to_bytes())
