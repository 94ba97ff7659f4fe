"""What peers announce that they can train: clients cut batches by it, and send longer rows to nobody."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch

from client.requests.caller import Caller
from client.swarm.swarm import Swarm
from protocol.errors import TooLong
from protocol.records import PeerRecord, Trainable
from tests.tools.swarm import Both

IDS = torch.randint(3, 100, (5, 12), generator=torch.Generator().manual_seed(1))
Announced = Callable[..., None]


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch) -> Announced:
    """Has the peers of given blocks announce something else than they do."""
    changes: dict[int, Trainable | None] = {}
    look_up = Swarm._look_peers_up

    async def change(swarm: Swarm) -> list[PeerRecord]:
        found = await look_up(swarm)
        return [peer.model_copy(update={"trainable": changes.get(peer.start, peer.trainable)}) for peer in found]

    monkeypatch.setattr(Swarm, "_look_peers_up", change)
    return changes.update


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows of each forward request, and the first block of its hop."""
    seen: list[tuple[int, int]] = []
    ask = Caller.forward

    def forward(caller: Caller, work: Any, hop: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        seen.append((hidden.shape[0], hop.start))
        return ask(caller, work, hop, hidden, *rest)

    monkeypatch.setattr(Caller, "forward", forward)
    return seen


def train(model: Any) -> Iterator[torch.Tensor]:
    """The loss of a batch, and its gradients."""
    torch.manual_seed(3)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    loss = tuned.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    yield loss
    yield from (parameter.grad for parameter in tuned.parameters() if parameter.grad is not None)


def test_peers_say_what_they_can_train(llamas: Both) -> None:
    swarm = llamas.remote().swarm.network
    for peer in swarm.loop.run(swarm.fetch_peers()):
        assert peer.trainable.row == peer.max_length
        assert peer.trainable.tokens > peer.trainable.row


@pytest.mark.parametrize(
    ("tokens", "rows"), [((24, 40), [2, 1, 2]), ((1, 60), [1] * 5), ((0, 0), [1] * 5), ((61, 60), [5])]
)
def test_batches_are_cut_by_what_the_weakest_peer_can_train(
    llamas: Both, announced: Announced, calls: list[tuple[int, int]], tokens: tuple[int, int], rows: list[int]
) -> None:
    announced({0: Trainable(row=12, tokens=tokens[0]), 2: Trainable(row=12, tokens=tokens[1]), 3: None})
    found, expected = train(llamas.remote()), train(llamas.local())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert sorted(count for count, start in calls if start == 0) == sorted(rows)


def test_a_row_that_no_peer_can_train(llamas: Both, announced: Announced, calls: list[tuple[int, int]]) -> None:
    """Is refused before anything is sent; without gradients it takes no such memory."""
    announced({0: None, 2: Trainable(row=10, tokens=100), 3: Trainable(row=11, tokens=100)})
    told = (
        "No peer of blocks 2:5 has the memory to train rows of 12 tokens; those that serve them take 10 at most, "
        "so shorten the rows of the batch."
    )
    with pytest.raises(TooLong) as refused:
        list(train(llamas.remote()))
    assert str(refused.value) == told
    assert not calls
    with torch.no_grad():
        ours, theirs = (model(input_ids=IDS).logits for model in (llamas.remote(), llamas.local()))
    assert torch.equal(ours, theirs)


def test_a_row_goes_to_a_peer_that_can_train_it(
    llamas: Both, announced: Announced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another would be quicker."""
    announced({2: Trainable(row=11, tokens=100)})
    swarm = llamas.remote().swarm.network
    find = lambda row: swarm.loop.run(swarm.find_route(2, 3, "forward", row=row))  # noqa: E731
    (hop,) = find(11)
    twin = hop.peer.model_copy(update={"peer_id": "Qm" + "a" * 44, "trainable": Trainable(row=12, tokens=100)})
    monkeypatch.setattr(swarm, "_known", [*swarm._known, twin.model_copy(update={"speed": _slow(twin)})])
    assert find(11) == [hop]
    assert [hop.peer.peer_id for hop in find(12)] == [twin.peer_id]


def _slow(peer: PeerRecord) -> Any:
    return peer.speed.model_copy(update={"forward": peer.speed.forward / 100})
