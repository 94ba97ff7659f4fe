"""What members announce on their networks: who can read it, and what anybody else may send in its place."""

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bootstrap.discovery.announcement import MAX_ADDRESSES, day_of, find_day, new_name, seal, unseal
from tests.tools.seekers import LAB, OTHER, peer_id

PLACES = [f"/ip4/10.0.0.1/tcp/31337/p2p/{peer_id('a')}", f"/ip6/fd77::1/tcp/31337/p2p/{peer_id('a')}"]
TODAY = 20_000


@pytest.fixture(scope="module")
def name() -> str:
    return new_name(LAB, TODAY)


def test_members_read_it(name: str):
    assert find_day(LAB, name, TODAY) == TODAY
    assert unseal(LAB, TODAY, name, seal(LAB, TODAY, name, PLACES)) == PLACES


@pytest.mark.parametrize(("today", "known"), [(TODAY - 2, 0), (TODAY - 1, 1), (TODAY + 1, 1), (TODAY + 2, 0)])
def test_a_name_lives_for_a_day(name: str, today: int, known: int):
    assert find_day(LAB, name, today) == (TODAY if known else None)


def test_a_day_ends_at_midnight():
    assert day_of(86400 * 3 - 0.1) == 2
    assert day_of(86400 * 3) == 3


def test_others_cannot_tell_swarms_apart(name: str):
    """Nothing in it is the same twice, nor readable without the secret."""
    assert find_day(OTHER, name, TODAY) is None
    again, sealed = new_name(LAB, TODAY), [seal(LAB, TODAY, name, PLACES) for _ in range(2)]
    assert not {again[at : at + 8] for at in range(0, 32, 8)} & {name[at : at + 8] for at in range(0, 32, 8)}
    for parts in zip(*([one[at : at + 4] for at in range(0, len(one), 4)] for one in sealed), strict=True):
        assert len(set(parts)) == 2
    secret_bytes = (base58.b58decode(peer_id("a"))[2:10], bytes([10, 0, 0, 1]), (31337).to_bytes(2, "little"))
    assert not any(part in sealed[0] for part in secret_bytes)
    with pytest.raises(ValueError, match="sealed"):
        unseal(OTHER, TODAY, name, sealed[0])


def test_it_is_bound_to_its_name_and_day(name: str):
    sealed = seal(LAB, TODAY, name, PLACES)
    for other_day, other_name in ((TODAY + 1, name), (TODAY, new_name(LAB, TODAY))):
        with pytest.raises(ValueError, match="sealed"):
            unseal(LAB, other_day, other_name, sealed)


def test_it_stays_short(name: str):
    many = [f"/ip6/fd77::{number:x}/tcp/31337/p2p/{peer_id('a')}" for number in range(1, 50)]
    sealed = seal(LAB, TODAY, name, many)
    assert unseal(LAB, TODAY, name, sealed) == many[:MAX_ADDRESSES]
    assert len(sealed) < 400


@given(st.integers(0, 200), st.integers(0, 7))
def test_one_bit_is_enough_to_refuse_it(at: int, bit: int):
    name = new_name(LAB, TODAY)
    sealed = bytearray(seal(LAB, TODAY, name, PLACES))
    sealed[at % len(sealed)] ^= 1 << bit
    with pytest.raises(ValueError, match="sealed"):
        unseal(LAB, TODAY, name, bytes(sealed))


@given(st.text() | st.binary(max_size=40).map(bytes.hex), st.binary(max_size=700))
def test_anything_may_come(name: str, sealed: bytes):
    assert find_day(LAB, name, TODAY) is None
    with pytest.raises(ValueError, match=r"sealed|short"):
        unseal(LAB, TODAY, name, sealed)


@given(st.binary(max_size=200))
def test_a_member_may_seal_anything(body: bytes):
    """Whoever knows the secret can have others read what he likes: nothing but addresses comes out of it."""
    from bootstrap.discovery import announcement

    name, nonce = new_name(LAB, TODAY), b"n" * 12
    sealed = nonce + announcement._cipher(LAB, TODAY).encrypt(nonce, body, name.encode())
    try:
        found = unseal(LAB, TODAY, name, sealed)
    except ValueError:
        return
    assert all(address.startswith(("/ip4/", "/ip6/")) for address in found)
