"""Peers and clients without a model's folder: they get it from the swarm, each what it needs, from whoever has it."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from protocol.membership.certificate import Role
from protocol.weights.cache import Cache, Entry
from protocol.weights.obtain import Pins
from tests.tools.command import Command
from tests.tools.swarm import Peer, Swarm
from tests.tools.swarms import found, home, let_in

LOCAL = ("--host", "127.0.0.1", "--threads", "1")


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The founder's model, under a name that no other machine has anything of."""
    return Path(shutil.copytree(llama, tmp_path_factory.mktemp("founder") / "our-model"))


@pytest.fixture(autouse=True)
def client_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process, which is the client, is a machine of its own."""
    monkeypatch.setenv("HIVETUNE_CACHE", str(tmp_path / "client"))
    return tmp_path / "client"


class Machines:
    """Peers of one swarm, each with a cache of its own."""

    def __init__(self, swarm: Swarm, root: Path):
        self.swarm, self.root = swarm, root

    def launch(self, machine: str, *argv: str, lie: str | None = None) -> Peer:
        join = [part for peer in self.swarm.peers[:1] for part in ("--initial-peers", peer.address)]
        return self.swarm.launch(
            *argv, *LOCAL[: 4 if argv[0] == "serve" else 2], *join, cache=self.root / machine, lie=lie
        )

    def start(self, machine: str, *argv: str, lie: str | None = None) -> Peer:
        peer = self.launch(machine, *argv, lie=lie)
        peer.wait_ready()
        return peer

    def entry(self, machine: str) -> Entry:
        (found,) = Cache(self.root / machine / "models").entries()
        return found


@pytest.fixture
def machines(swarm: Swarm, tmp_path: Path) -> Machines:
    return Machines(swarm, tmp_path)


IDS = torch.arange(3, 19)[None]


def test_a_model_by_its_name(machines: Machines, folder: Path, tmp_path: Path) -> None:
    """One machine has the folder. Another serves blocks of it, and a client uses it, by the name alone."""
    founder = machines.start("founder", "serve", str(folder), "--blocks", "0:3")
    second = machines.start("second", "serve", "our-model")
    assert second.blocks == range(0, 5)
    machines.start("mirror", "share", "our-model")
    assert machines.entry("mirror").held == machines.entry("mirror").size
    founder.kill()  # each piece has a second holder
    whole = transformers.AutoModelForCausalLM.from_pretrained(machines.entry("mirror").folder)
    with pytest.raises(OSError, match="model-00001-of"):  # rather than with zeros for weights
        transformers.AutoModelForCausalLM.from_pretrained(machines.entry("second").folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(whole(IDS).logits, plain(IDS).logits)
    remote = machines.swarm.connect("our-model", initial_peers=[second.address])
    remote.save_pretrained(tmp_path / "saved")
    again = machines.swarm.connect(tmp_path / "saved", initial_peers=[second.address])
    assert torch.equal(again(IDS).logits, plain(IDS).logits)
    assert_computes_as(remote, plain)
    tokenizer = transformers.AutoTokenizer.from_pretrained(remote.name_or_path)
    assert tokenizer("w3 w4")["input_ids"] == transformers.AutoTokenizer.from_pretrained(folder)("w3 w4")["input_ids"]


def assert_computes_as(remote: Any, plain: Any) -> None:
    """Logits, tokens, and gradients of a LoRA step are the same numbers."""
    import peft

    assert torch.equal(remote(IDS).logits, plain(IDS).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(remote.generate(IDS, **options), plain.generate(IDS, **options))
    gradients = []
    for model in (remote, plain):
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        tuned(IDS, labels=IDS).loss.backward()
        gradients.append({name: one.grad for name, one in tuned.named_parameters() if one.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_each_fetches_what_it_needs(machines: Machines, folder: Path, client_cache: Path) -> None:
    founder = machines.start("founder", "share", str(folder))
    machines.start("second", "serve", "our-model", "--blocks", "0:2")
    machines.start("third", "serve", "our-model")
    machines.swarm.connect("our-model")
    client = next(iter(Cache(client_cache / "models").entries()))
    needed = machines.entry("second").held + machines.entry("third").held + client.held
    assert founder.bytes_given() <= 1.1 * needed
    assert machines.entry("second").held < 0.7 * client.size
    assert client.held < 0.6 * client.size


def test_a_fetch_that_is_killed_goes_on_where_it_was(machines: Machines, folder: Path) -> None:
    """Nothing is fetched twice, and nothing that was fetched half is used."""
    founder = machines.start("founder", "share", str(folder), "--upload-rate", "100000")
    fetching = machines.launch("second", "serve", "our-model")
    wait_until(lambda: founder.bytes_given() > 60_000)
    fetching.kill()
    assert machines.entry("second").held > 30_000
    machines.start("second", "serve", "our-model")
    entry = machines.entry("second")
    known = Cache(machines.root / "second" / "models").find(entry.folder)
    assert known is not None
    on_its_way = 2 * max(piece.size for piece in known[0].pieces)  # over two streams, when it was killed
    assert entry.held <= founder.bytes_given() <= entry.held + on_its_way


def test_status_shows_who_fetches_what(machines: Machines, folder: Path, command: Command) -> None:
    founder = machines.start("founder", "share", str(folder), "--upload-rate", "20000", "--name", "[/red]disk")
    machines.launch("second", "serve", "our-model", "--name", "slow")
    join = ("--initial-peers", founder.address)

    def seen() -> str:
        return " ".join(command("status", *join).stdout.split())

    wait_until(lambda: "slow is fetching our-model@" in seen())
    shown = seen()
    assert "No peer serves any model in this swarm." in shown
    assert re.search(r"\[/red\]disk gives 0\.2 MB of our-model@[0-9a-f]{12}\.", shown)
    assert re.search(r"slow is fetching our-model@\w{12}: \d+% of 0\.\d MB at \d\.\d MB/s, \d+ s left\.", shown)
    (model,) = json.loads(command("status", "--json", *join).stdout)
    assert (model["model"], model["peers"], model["holes"]) == ("our-model", [], [[0, 5]])
    assert {one["name"]: one["held"] >= one["wanted"] for one in model["weights"]} == {
        "[/red]disk": True,
        "slow": False,
    }


def test_copies_made_at_the_same_time(machines: Machines, folder: Path) -> None:
    """Four peers fetch the same blocks, and little more than one copy leaves the founder."""
    founder = machines.start("founder", "share", str(folder), "--upload-rate", "50000")
    peers = [machines.launch(name, "serve", "our-model", "--blocks", "0:5") for name in "abcd"]
    for peer in peers:
        peer.wait_ready()
    copy = machines.entry("a").held
    assert founder.bytes_given() <= 1.6 * copy
    assert sum(peer.bytes_given() for peer in peers) >= 2.4 * copy


def wait_until(condition: Callable[[], bool], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_member_that_gives_wrong_weights(machines: Machines, folder: Path) -> None:
    machines.start("liar", "share", str(folder), lie="weights")
    machines.start("honest", "share", str(folder))
    second = machines.start("second", "serve", "our-model")
    assert "is asked no more" in second.stderr.read_text() or machines.swarm.peers[0].bytes_given() == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    remote = machines.swarm.connect("our-model")
    assert torch.equal(remote(IDS).logits, plain(IDS).logits)


def test_a_private_swarm(machines: Machines, folder: Path, tmp_path: Path) -> None:
    """Weights are given to members, by those whose role it is to serve; what a name stands for is kept by swarm."""
    founder = found(tmp_path / "home-of-founder")
    let_in(founder, tmp_path / "home-of-server", Role.SERVE)
    user = let_in(founder, tmp_path / "home-of-user", Role.USE)
    machines.swarm.home = tmp_path / "home-of-founder"
    first = machines.start("founder", "share", str(folder))
    machines.swarm.home = tmp_path / "home-of-server"
    machines.start("server", "serve", "--swarm", "lab")
    machines.swarm.home = tmp_path / "home-of-user"
    refused = machines.launch("user", "share", str(folder), "--swarm", "lab")
    wait_until(lambda: not refused.is_alive())
    assert refused.stdout.with_suffix(".code").read_text() == "2"
    with home(tmp_path / "home-of-user"):
        remote = machines.swarm.connect("our-model", swarm="lab", initial_peers=[first.address])
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(remote(IDS).logits, plain(IDS).logits)
    assert Pins(user.models).get("our-model") == machines.entry("server").manifest


def test_two_versions_under_one_name(machines: Machines, folder: Path, tmp_path: Path, command: Command) -> None:
    """Which one a machine is on is pinned at first use, and said."""
    machines.start("old", "share", str(folder))
    machines.start("second", "serve", "our-model")
    new = Path(shutil.copytree(folder, tmp_path / "new" / "our-model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(new)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    for file in [*new.glob("*.safetensors"), *new.glob("*.index.json")]:
        file.unlink()
    model.save_pretrained(new)
    fresh = machines.start("new", "share", str(new))
    version = fresh.stdout.read_text().split("manifest=")[1].strip()
    join = ("--initial-peers", machines.swarm.peers[0].address)
    stays = machines.start("second", "serve", "our-model")
    assert f"our-model@{version[:12]} as well" in stays.stderr.read_text().replace("\n", " ")
    changed = machines.start("third", "serve", f"our-model@{version[:12]}")
    assert f"using our-model@{version[:12]} of the swarm" in changed.stderr.read_text()
    remote = machines.swarm.connect(f"our-model@{version[:12]}")
    assert torch.equal(remote(IDS).logits, model(IDS).logits)
    assert "is not one of the versions" in command("generate", "our-model@ffff", "w1", *join).refusal()


def test_another_name_than_the_folder_s(machines: Machines, folder: Path, command: Command) -> None:
    """That of a hub model, which then comes from the swarm where the hub cannot be asked."""
    machines.start("founder", "share", str(folder), "--model-name", "acme/llama")
    second = machines.start("second", "serve", "acme/llama")
    assert second.stdout.read_text().strip().endswith("blocks=0:5 model=acme/llama")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(machines.swarm.connect("acme/llama")(IDS).logits, plain(IDS).logits)
    join = ("--initial-peers", machines.swarm.peers[0].address)
    refused = command("serve", "acme/llama", "--model-name", "mine", *join, *LOCAL).refusal()
    assert "The swarm calls this model acme/llama@" in refused
    for name in ("", "a/b/c", "../x", "a b", "x@1"):
        assert "cannot be asked for" in command("serve", str(folder), "--model-name", name, *join, *LOCAL).refusal()


def test_a_disk_that_is_too_small(machines: Machines, folder: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", small]).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        machines.start("founder", "share", str(folder))
        peer = machines.launch("small", "serve", "our-model")
        wait_until(lambda: not peer.is_alive())
        lines = [line for line in peer.stderr.read_text().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "The disk is full" in lines[0]
        assert peer.stdout.with_suffix(".code").read_text() == "2"
        assert "Traceback" not in peer.stderr.read_text()
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_the_cache_is_listed_and_emptied(
    machines: Machines, folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.start("founder", "share", str(folder))
    second = machines.start("second", "serve", "our-model")
    monkeypatch.setenv("HIVETUNE_CACHE", str(machines.root / "second"))
    assert "our-model" in command("cache", "list").stdout
    assert "is in use by a process" in command("cache", "remove", "our-model").refusal()
    second.stop(signal.SIGTERM)
    removed = command("cache", "remove", "our-model")
    assert removed.stdout.startswith("removed model=our-model version=")
    assert "No model has been fetched" in command("cache", "list").stdout
    assert "those that have: none" in command("cache", "remove", "our-model").refusal()


def test_the_cache_stays_within_its_size(machines: Machines, folder: Path, llama: Path) -> None:
    machines.start("founder", "share", str(folder))
    refused = machines.launch("second", "serve", "our-model", "--cache-size", "100000")
    wait_until(lambda: not refused.is_alive())
    assert "allow more with --cache-size" in refused.stderr.read_text()


def test_nobody_has_it(machines: Machines, folder: Path, command: Command) -> None:
    founder = machines.start("founder", "share", str(folder))
    join = ("--initial-peers", founder.address)
    assert "has no config.json" in command("serve", "their-model", *join, *LOCAL).refusal()
