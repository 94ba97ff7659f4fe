"""More caches than peers hold sessions for: those that lie idle give way, and are made again when they are used."""

from typing import Any

import pytest
import torch

from client.swarm.sessions import OpenSessions
from tests.tools.arena import one
from tests.tools.swarm import Both, Swarm

IDS = one()["input_ids"]
MANY = 132


def go_on(model: Any, cache: Any) -> torch.Tensor:
    return model(IDS[:, :2], past_key_values=cache).logits  # type: ignore[no-any-return]


@torch.no_grad()
def test_outputs_that_are_kept(llamas: Both) -> None:
    """More than a client may have sessions, and no peer had to say so. The oldest, and a copy of it, go on."""
    model, local = llamas.remote(), llamas.local()
    outputs = [model.generate(IDS, max_new_tokens=1, return_dict_in_generate=True) for _ in range(MANY)]
    assert not any(model.swarm.health.is_banned(peer.peer_id) for peer in llamas.swarm.peers)
    expected = go_on(local, local(IDS).past_key_values)
    for number in (0, 1, MANY - 1):
        torch.testing.assert_close(go_on(model, outputs[number].past_key_values), expected)


@torch.no_grad()
@pytest.mark.parametrize("limit", [("--client-sessions", "3"), ("--cache-tokens", "64", "--max-length", "32")])
def test_peers_that_have_room_for_few(limit: tuple[str, ...], swarm: Swarm, llamas: Both) -> None:
    swarm.serve(llamas.path, "0:5", options=limit)
    model, local = swarm.connect(llamas.path), llamas.local()
    caches = [model(IDS).past_key_values for _ in range(9)]
    expected = go_on(local, local(IDS).past_key_values)
    for cache in caches:
        torch.testing.assert_close(go_on(model, cache), expected)
    assert not model.swarm.health.is_banned(swarm.peers[0].peer_id)


class _Session:
    def __init__(self, is_idle: bool, sessions: OpenSessions):
        self.is_idle, self.sessions = is_idle, sessions

    def close(self) -> None:
        self.sessions.remove("p", self)


def test_the_one_that_lay_idle_the_longest_gives_way() -> None:
    sessions = OpenSessions()
    busy, first, second = _Session(False, sessions), _Session(True, sessions), _Session(True, sessions)
    for session in (busy, first, second, first):
        sessions.add("p", session)
    assert sessions.give_way("p")
    assert list(sessions._open["p"]) == [busy, first]
    assert sessions.give_way("p")
    assert not sessions.give_way("p")
    assert list(sessions._open["p"]) == [busy]
