"""Peers that lie are found, kept away from, and reported; honest ones are not."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from client.requests.verify import Undecided, agree
from protocol import swarm_pb2 as pb
from protocol.codecs import round_trip
from tests.tools.arena import assert_close, batch, step, with_adapter
from tests.tools.command import Command
from tests.tools.swarm import ForkServer, Peer, Swarm, new_swarm


@pytest.fixture(scope="module")
def honest(fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[tuple[Path, Swarm]]:
    """Two honest peers for all blocks, and one more whose weights are quantized."""
    with new_swarm(fork_server) as swarm:
        swarm.serve(models("llama"), "0:5", "0:5")
        swarm.serve(models("llama"), "0:5", options=("--quantize", "int8"))
        yield models("llama"), swarm


@pytest.fixture(scope="module")
def local(models: Callable[[str], Path]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(models("llama")).eval()


def connect(path: Path, swarm: Swarm, first: Peer, verify: float, among: list[Peer], **options: Any) -> Any:
    """A model that goes through `first` as long as it trusts it."""
    allowed = [peer.peer_id for peer in among]
    model = swarm.connect(path, verify=verify, allowed_peers=allowed, max_attempts=3, **options)
    for peer in among:
        if peer is not first:
            model.swarm.health.measured(peer.peer_id, 9.0)
    assert [hop.peer.peer_id for hop in model.swarm.route()] == [first.peer_id]
    return model


def test_honest_peers_are_trusted(honest: tuple[Path, Swarm], local: Any, models: Callable[[str], Path]) -> None:
    """Every answer is checked, the quantized peer's and by it too."""
    path, swarm = honest
    for first in (swarm.peers[0], swarm.peers[2]):
        model = connect(path, swarm, first, 1.0, swarm.peers)
        tokens = model.generate(**batch())
        step(with_adapter(model))
        assert not model.swarm.health._bans
        assert first is swarm.peers[2] or torch.equal(tokens, local.generate(**batch()))


CODECS = {"codec_out": "int8", "codec_back": "int8", "codec_gradients": "bf16"}


def test_honest_peers_are_trusted_under_codecs(honest: tuple[Path, Swarm]) -> None:
    """Also where the answer is small beside what it is added to, and so beside what the codec takes from it."""
    path, swarm = honest
    for first in (swarm.peers[0], swarm.peers[2]):
        model = connect(path, swarm, first, 1.0, swarm.peers, **CODECS)
        model.generate(**batch())
        step(with_adapter(model))
        model.swarm.blocks(100 * torch.randn(1, 4, 32), 2, 3)
        assert not model.swarm.health._bans


def test_a_liar_is_found_under_codecs(honest: tuple[Path, Swarm]) -> None:
    path, swarm = honest
    for lie in ("outputs", "gradients"):
        liar = swarm.serve(path, "0:5", lie=lie)[0]
        model = with_adapter(connect(path, swarm, liar, 1.0, [liar, *swarm.peers[:2]], **CODECS))
        step(model)
        assert liar.peer_id in model.get_base_model().swarm.health._bans
        liar.kill()


@pytest.mark.parametrize("lie", ["outputs", "subtle", "replayed"])
def test_a_liar_is_found_in_generation(lie: str, honest: tuple[Path, Swarm], local: Any) -> None:
    path, swarm = honest
    liar = swarm.serve(path, "0:5", lie=lie)[0]
    model = connect(path, swarm, liar, 1.0, [liar, *swarm.peers[:2]])
    options = batch() | {"max_new_tokens": 4}
    assert torch.equal(model.generate(**options), local.generate(**options))
    assert model.swarm.health._bans[liar.peer_id].until > 600
    liar.kill()


@pytest.mark.parametrize("lie", ["outputs", "gradients", "replayed"])
def test_a_liar_is_found_in_training(
    lie: str, honest: tuple[Path, Swarm], models: Callable[[str], Path], command: Command
) -> None:
    path, swarm = honest
    liar = swarm.serve(path, "0:5", lie=lie, options=("--name", f"{lie}-liar"))[0]
    model = with_adapter(connect(path, swarm, liar, 1.0, [liar, *swarm.peers[:2]]))
    theirs = with_adapter(transformers.AutoModelForCausalLM.from_pretrained(models("llama")))
    for _ in range(2):  # the answer that is replayed was right the first time
        assert_close(step(model), step(theirs))
        with torch.no_grad():
            for tuned in (model, theirs):
                for _, parameter in sorted((n, p) for n, p in tuned.named_parameters() if p.requires_grad):
                    parameter.mul_(1.5)
    assert liar.peer_id in model.get_base_model().swarm.health._bans
    status = json.loads(command("status", "--json", "--initial-peers", swarm.initial_peers[0]).stdout)
    complaints = {peer["peer_id"]: peer["complaints"] for peer in status[0]["peers"]}
    assert complaints[liar.peer_id] == 1
    assert sum(complaints.values()) - sum(c for p, c in complaints.items() if p == liar.peer_id) == 0
    shown = command("status", "--initial-peers", swarm.initial_peers[0]).stdout
    assert f"{lie}-liar" in shown
    assert "answers wrongly" in shown.replace("\n", " ")
    liar.kill()


def test_the_one_who_checks_may_be_the_liar(honest: tuple[Path, Swarm], local: Any) -> None:
    path, swarm = honest
    liar = swarm.serve(path, "0:5", lie="outputs")[0]
    model = connect(path, swarm, swarm.peers[0], 1.0, [liar, *swarm.peers[:2]])
    model.swarm.health.measured(liar.peer_id, 1e-9)
    model.swarm.health.measured(swarm.peers[0].peer_id, 0.0)
    options = batch() | {"max_new_tokens": 4}
    assert torch.equal(model.generate(**options), local.generate(**options))
    assert set(model.swarm.health._bans) <= {liar.peer_id}
    liar.kill()


def test_two_disagree_and_nobody_can_tell(honest: tuple[Path, Swarm]) -> None:
    path, swarm = honest
    liar = swarm.serve(path, "0:5", lie="outputs")[0]
    model = connect(path, swarm, swarm.peers[0], 1.0, [liar, swarm.peers[0]])
    with pytest.raises(Undecided, match="disagree on a step, and there is no other to tell who is right"):
        model(batch()["input_ids"])
    liar.kill()


def test_a_share_of_the_answers_is_checked(honest: tuple[Path, Swarm]) -> None:
    """Of n answers with share p none is checked with probability (1 - p)^n."""
    path, swarm = honest
    liar = swarm.serve(path, "0:5", lie="outputs")[0]
    unchecked = 0
    for _ in range(40):
        model = connect(path, swarm, liar, 0.5, [liar, *swarm.peers[:2]])
        for _ in range(2):
            model(batch()["input_ids"])
        unchecked += liar.peer_id not in model.swarm.health._bans
    assert 2 <= unchecked <= 20  # expected 10; outside with probability 0.0006
    liar.kill()


def test_the_tolerance() -> None:
    base = torch.randn(1, 8, 4)
    update = torch.randn(1, 8, 4)
    ours = {"hidden_states": base + update, "adapter.a": torch.ones(3)}

    def accepted(tolerance: float = 0.01, **changed: torch.Tensor) -> bool:
        return agree({**ours, **changed}, ours, {"hidden_states": base}, tolerance)

    assert accepted()
    assert accepted(hidden_states=base + update * 1.005)
    assert not accepted(hidden_states=base + update * 1.05)
    assert not accepted(hidden_states=base)
    assert not accepted(hidden_states=base, tolerance=0.9)
    assert not accepted(hidden_states=base * float("nan"))
    one_token = base + update
    one_token[0, 3] += 1.0
    assert not accepted(hidden_states=one_token)
    assert not accepted(**{"adapter.a": torch.zeros(3)})
    assert not agree({"hidden_states": base}, ours, {}, 0.9)


def test_what_a_codec_takes_is_allowed_and_no_more() -> None:
    torch.manual_seed(0)
    base, update = 100 * torch.randn(1, 8, 64), torch.randn(1, 8, 64)
    theirs = {"hidden_states": base + update}
    mine = {"hidden_states": round_trip(base + update, pb.INT8)}
    assert not agree(mine, theirs, {"hidden_states": base}, 0.01)
    assert agree(mine, theirs, {"hidden_states": base}, 0.01, pb.INT8)
    wrong = {"hidden_states": round_trip(base + 2 * update, pb.INT8)}
    assert not agree(wrong, theirs, {"hidden_states": base}, 0.01, pb.INT8)
