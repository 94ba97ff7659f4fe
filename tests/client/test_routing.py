"""Routes over overlapping spans, bans, and which blocks a new peer takes."""

import random
import time

import pytest

from client.swarm import health as health_module
from client.swarm.health import Health
from client.swarm.routes import Hop, find_route
from peer.start.placement import choose_blocks
from protocol.errors import NoRoute
from protocol.records import ModelId, PeerRecord, PeerState, Speed, holes

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def peer(name: str, start: int, end: int, *, speed: float = 100.0, total: int = 200) -> PeerRecord:
    return PeerRecord(
        peer_id="".join(_ALPHABET[ord(character) % 58] for character in name).rjust(46, "Q"),
        name=name,
        model=ModelId(name="m", config_hash="0" * 32, num_blocks=total),
        start=start,
        end=end,
        dtype="float32",
        quantization="none",
        speed=Speed(decode=speed, forward=speed),
        free_cache_tokens=100,
        max_length=100,
        version="1",
    )


def spans(hops: list[Hop]) -> list[str]:
    return [str(hop) for hop in hops]


def per_block(record: PeerRecord, blocks: int) -> float:
    """Every hop costs one, every block what its peer needs for it."""
    return 1.0 + blocks / record.speed.decode


# Routes


def test_a_chain_of_peers() -> None:
    route = find_route([peer("c", 3, 5), peer("a", 0, 2), peer("b", 2, 3)], 0, 5, per_block)
    assert spans(route) == ["0:2@a", "2:3@b", "3:5@c"]


def test_a_span_is_used_in_part() -> None:
    peers = [peer("a", 0, 12), peer("b", 8, 16)]
    assert spans(find_route(peers, 3, 7, per_block)) == ["3:7@a"]
    assert spans(find_route(peers, 3, 10, per_block)) == ["3:10@a"]
    assert spans(find_route(peers, 10, 14, per_block)) == ["10:14@b"]


@pytest.mark.parametrize(("slow", "border"), [("a", 8), ("b", 12)])
def test_overlapping_spans_meet_where_the_faster_peer_does_more(slow: str, border: int) -> None:
    speeds = {"a": 100.0, "b": 100.0} | {slow: 10.0}
    peers = [peer("a", 0, 12, speed=speeds["a"]), peer("b", 8, 16, speed=speeds["b"])]
    assert spans(find_route(peers, 0, 16, per_block)) == [f"0:{border}@a", f"{border}:16@b"]


def test_one_long_fast_span_is_preferred_to_many_hops() -> None:
    many = [peer(f"m{i}", i, i + 1, speed=1000.0) for i in range(8)]
    assert spans(find_route([*many, peer("long", 0, 8, speed=100.0)], 0, 8, per_block)) == ["0:8@long"]


def test_many_hops_are_preferred_to_one_crawling_span() -> None:
    fast = [peer("x", 0, 4, speed=1000.0), peer("y", 4, 8, speed=1000.0)]
    assert spans(find_route([*fast, peer("long", 0, 8, speed=1.0)], 0, 8, per_block)) == ["0:4@x", "4:8@y"]


def test_the_route_is_the_cheapest_of_all() -> None:
    generator = random.Random(5)
    for _ in range(30):
        total = 7
        peers = [peer(f"{i}", s := generator.randrange(total), generator.randint(s + 1, total),
                      speed=generator.uniform(0.3, 5)) for i in range(6)]  # fmt: skip
        cheapest = cheapest_of_all(peers, 0, total)
        if cheapest == float("inf"):
            with pytest.raises(NoRoute):
                find_route(peers, 0, total, per_block)
            continue
        route = find_route(peers, 0, total, per_block)
        assert [hop.start for hop in route] == [0, *(hop.end for hop in route[:-1])]
        assert route[-1].end == total
        assert all(hop.peer.start <= hop.start < hop.end <= hop.peer.end for hop in route)
        assert sum(per_block(hop.peer, hop.end - hop.start) for hop in route) == pytest.approx(cheapest)


def cheapest_of_all(peers: list[PeerRecord], start: int, end: int) -> float:
    """By trying every hop from here."""
    if start == end:
        return 0.0
    hops = ((p, to) for p in peers if p.start <= start < p.end for to in range(start + 1, p.end + 1))
    return min((per_block(p, to - start) + cheapest_of_all(peers, to, end) for p, to in hops), default=float("inf"))


@pytest.mark.parametrize(
    ("served", "named"),
    [
        ([], "Blocks 0:9 "),
        ([(0, 3), (5, 7)], "Blocks 3:5, 7:9 "),
        ([(1, 9)], "Blocks 0:1 "),
        ([(0, 5), (4, 8)], "Blocks 8:9 "),
    ],
)
def test_holes_are_named(served: list[tuple[int, int]], named: str) -> None:
    with pytest.raises(NoRoute) as caught:
        find_route([peer(f"{s}", s, e) for s, e in served], 0, 9, per_block)
    assert str(caught.value).startswith(named)
    assert "peer serve" in str(caught.value)


def test_holes_outside_of_the_wanted_blocks_do_not_matter() -> None:
    assert holes([peer("a", 2, 4)], 2, 4) == []
    assert holes([peer("a", 2, 4)], 1, 6) == [range(1, 2), range(4, 6)]
    assert spans(find_route([peer("a", 2, 4)], 2, 4, per_block)) == ["2:4@a"]


@pytest.mark.parametrize("longest", [12, 60])
def test_a_large_swarm_is_routed_fast(longest: int) -> None:
    generator = random.Random(1)
    peers = []
    for i in range(200):
        start = generator.randrange(126)
        end = min(126, start + generator.randint(1, longest))
        peers.append(peer(str(i), start, end, speed=generator.uniform(50, 500)))
    peers += [peer("first", 0, 70), peer("last", 60, 126)]
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        route = find_route(peers, 0, 126, Health().decode_cost)
        seconds.append(time.process_time() - begin)
    assert route[-1].end == 126
    assert min(seconds) < 0.2


# What a client learns of peers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(health_module.time, "monotonic", lambda: now[0])
    return now


def ban_length(health: Health, clock: list[float], at_least: float = 0.0) -> float:
    """Ban a peer and wait until it is not banned any more."""
    health.ban("peer", at_least)
    begin = clock[0]
    while health.is_banned("peer"):
        clock[0] += 0.5
    return clock[0] - begin


def test_bans_get_longer_and_are_forgotten_after_a_success(clock: list[float]) -> None:
    health = Health()
    assert not health.is_banned("peer")
    lengths = [ban_length(health, clock) for _ in range(10)]
    assert lengths == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    health.succeed("peer")
    assert ban_length(health, clock) == 2


def test_an_answer_that_was_on_its_way_does_not_lift_a_ban(clock: list[float]) -> None:
    health = Health()
    health.ban("peer", at_least=3600)
    health.succeed("peer")
    assert health.is_banned("peer")


def test_a_ban_holds_for_what_the_peer_asked_at_least(clock: list[float]) -> None:
    health = Health()
    assert ban_length(health, clock, at_least=7) == 7
    assert ban_length(health, clock, at_least=1) == 4
    assert not health.is_banned("another")


def test_round_trips_and_speed_make_the_cost() -> None:
    health, near, far = Health(), peer("n", 0, 4, speed=100.0), peer("f", 0, 4, speed=200.0)
    assert health.decode_cost(near, 4) > health.decode_cost(far, 4)
    health.measured(near.peer_id, 0.001)
    health.measured(far.peer_id, 0.3)
    assert health.decode_cost(near, 4) == pytest.approx(0.001 + 0.0005 + 4 / 100)
    assert health.decode_cost(near, 4) < health.decode_cost(far, 4)
    assert health.forward_cost(far, 4) == pytest.approx(0.3 + 0.0005 + 512 * 4 / 200)
    health.measured(far.peer_id, 0.002)
    assert health.decode_cost(far, 4) == pytest.approx(0.002 + 0.0005 + 4 / 200)


def test_one_slow_round_trip_counts_for_little() -> None:
    health, record = Health(), peer("n", 0, 4)
    health.measured(record.peer_id, 0.01)
    before = health.decode_cost(record, 1)
    health.measured(record.peer_id, 0.06)
    assert before < health.decode_cost(record, 1) < before + 0.011


# Which blocks a new peer takes


@pytest.mark.parametrize(
    ("served", "count", "expected"),
    [
        ([], 4, range(0, 4)),
        ([(0, 4, 100)], 4, range(4, 8)),
        ([(0, 2, 100), (5, 10, 100)], 3, range(2, 5)),
        ([(0, 2, 100), (5, 10, 100)], 2, range(2, 4)),
        ([(0, 3, 100), (4, 10, 100)], 2, range(3, 5)),
        ([(0, 5, 100), (5, 10, 20)], 5, range(5, 10)),
        ([(0, 10, 100), (0, 6, 1)], 4, range(6, 10)),
        ([(0, 10, 100)], 10, range(0, 10)),
    ],
)
def test_a_new_peer_takes_the_blocks_with_the_least_behind_them(
    served: list[tuple[int, int, float]], count: int, expected: range
) -> None:
    peers = [peer(f"{i}", start, end, speed=speed, total=10) for i, (start, end, speed) in enumerate(served)]
    assert choose_blocks(peers, 10, count) == expected


def test_a_peer_that_leaves_counts_for_nothing() -> None:
    leaving = peer("l", 0, 5, total=10).model_copy(update={"state": PeerState.DRAINING})
    assert choose_blocks([leaving, peer("s", 5, 10, total=10)], 10, 5) == range(0, 5)
    assert choose_blocks([leaving, peer("s", 0, 5, total=10)], 10, 5) == range(5, 10)


def test_peers_that_join_one_by_one_cover_the_model() -> None:
    peers: list[PeerRecord] = []
    for i in range(4):
        blocks = choose_blocks(peers, 10, 3)
        peers.append(peer(f"{i}", blocks.start, blocks.stop, total=10))
    assert holes(peers, 0, 10) == []


def test_a_peer_that_was_slow_is_so_for_a_while(clock: list[float]) -> None:
    health, slow = Health(), peer("s", 0, 4, speed=100.0)
    usual = health.decode_cost(slow, 4)
    health.took(Hop(slow, 0, 4), 1, 2.0)
    assert health.decode_cost(slow, 4) == pytest.approx(2.0)
    assert health.decode_cost(slow, 2) == pytest.approx(1.0, abs=0.02)
    assert health.forward_cost(slow, 4) < 512 * 4 * 0.1  # of forwards it says nothing
    health.took(Hop(slow, 0, 4), 1, 0.0)
    assert health.decode_cost(slow, 4) == pytest.approx(1.4, abs=0.01)
    clock[0] += 61
    assert health.decode_cost(slow, 4) == usual
    health.took(Hop(slow, 0, 4), 1, 0.0)
    assert health.decode_cost(slow, 4) == usual  # no faster than it says: that was its cache, or luck


def test_requests_that_overlap_tell_nothing_of_a_peer() -> None:
    health = Health()
    with health.asking("one") as first, health.asking("another") as other:
        with health.asking("one") as second:
            pass
        with health.asking("one") as third:
            pass
    with health.asking("one") as later:
        pass
    assert [each.alone for each in (first, second, third)] == [False, False, False]
    assert other.alone
    assert later.alone
