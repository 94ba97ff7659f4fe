"""The `peer` command as people and scripts meet it: what it prints, how it ends, what it leaves behind."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
import transformers

from bootstrap.member import Member, MemberOptions
from client.swarm.loop import LOOP
from protocol import swarm_pb2 as pb
from protocol.channel import VERSION, Channel, Message
from protocol.model.checkpoint import open_checkpoint
from protocol.records import PeerRecord
from protocol.tensors import Limits
from tests.tools.command import Command
from tests.tools.hub import keep_revisions
from tests.tools.swarm import ForkServer, Swarm, new_swarm

ROOT = Path(__file__).parents[2]
ADDRESS = r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/Qm[1-9A-HJ-NP-Za-km-z]{44}"
LEAVES_WITHIN = 3.0
LOCAL = ("--host", "127.0.0.1")


@pytest.fixture
def founded(swarm: Swarm) -> Swarm:
    """A swarm of one bootstrap node."""
    swarm.launch("bootstrap", *LOCAL).wait_ready()
    return swarm


@contextlib.contextmanager
def observer(swarm: Swarm) -> Iterator[Member]:
    member = LOOP.run(Member.join(MemberOptions(tuple(swarm.initial_peers), client_mode=True)))
    yield member
    LOOP.run(member.shutdown())


def announced(member: Member, model: Path) -> list[PeerRecord]:
    return LOOP.run(member.directory.peers(open_checkpoint(str(model)).model_id.config_hash))


def family(process_id: int) -> list[psutil.Process]:
    """A process and its children, p2pd among them."""
    process = psutil.Process(process_id)
    found = [process, *process.children(recursive=True)]
    assert [child.name() for child in found[1:]] == ["p2pd"]
    return found


def assert_nothing_is_left(processes: list[psutil.Process], within: float = 0.5) -> None:
    _, alive = psutil.wait_procs(processes, within)
    assert alive == []
    assert list(Path("/tmp").glob(f"hivetune-{processes[0].pid}-*")) == []


# Real processes, as a shell starts them


@pytest.fixture(scope="module")
def shell(llama: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """`peer serve` and `peer bootstrap`, both starting."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "peer", *arguments],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_DISPLAY_ENV": "VERBOSE"},
        )  # fmt: skip

    limits = ("--max-length", "16384", "--threads", "1")
    started = {
        "serve": start("serve", str(llama), "--blocks", "1:4", "--name", "shell", *LOCAL, *limits),
        "bootstrap": start("bootstrap", *LOCAL),
    }
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize(
    ("name", "details", "number"),
    [("bootstrap", "", signal.SIGINT), ("serve", " blocks=1:4 model=llama", signal.SIGTERM)],
)
def test_a_process_says_when_it_is_ready_and_leaves_when_told(
    shell: dict[str, subprocess.Popen[str]], name: str, details: str, number: int, llama: Path
) -> None:
    process = shell[name]
    assert process.stdout
    line = process.stdout.readline()
    assert re.fullmatch(f"ready address={ADDRESS}{details}\n", line)
    processes = family(process.pid)
    if name == "serve":
        keep_busy(line.split()[1].removeprefix("address="), llama)
    begin = time.monotonic()
    process.send_signal(number)
    rest, log = process.communicate(timeout=10)
    assert time.monotonic() - begin < LEAVES_WITHIN
    assert process.returncode == 0, log
    assert rest == ""
    assert "Traceback" not in log
    assert "GOMP_SPINCOUNT = '6000'" in log, "torch was imported before the package `peer`"
    assert_nothing_is_left(processes)


def keep_busy(address: str, model: Path) -> None:
    """Give a peer work for far longer than it has to leave, and go away."""
    checkpoint = open_checkpoint(str(model))

    async def ask() -> None:
        member = await Member.join(MemberOptions((address,), client_mode=True))
        channel = Channel(await member.transport.connect(address.rpartition("/")[2]), Limits(), 10)
        hello = pb.Hello(version=VERSION, config_hash=checkpoint.model_id.config_hash, weights=checkpoint.digests)
        await channel.call(Message(hello))
        hidden = torch.zeros(16, 16384, 32)
        await channel.send(Message(pb.Forward(context=pb.Context(start=1, end=4)), {"hidden_states": hidden}))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(channel.receive_answer(), 0.7)
            raise AssertionError("the peer was not kept busy")
        await member.shutdown()

    LOOP.run(ask())


# Leaving


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_peer_that_leaves_is_withdrawn_at_once(founded: Swarm, llama: Path, number: int) -> None:
    founded.serve(llama, "0:3", "3:5")
    with observer(founded) as member:
        assert [(peer.start, peer.end) for peer in announced(member, llama)] == [(0, 3), (3, 5)]
        processes = family(founded.peers[1].pid)
        assert founded.peers[1].stop(number) < LEAVES_WITHIN
        assert [(peer.start, peer.end) for peer in announced(member, llama)] == [(3, 5)]
        assert_nothing_is_left(processes)
        assert founded.peers[0].stop(number) < LEAVES_WITHIN  # now the last one cannot withdraw its record
        processes = family(founded.peers[2].pid)
        assert founded.peers[2].stop(number) < LEAVES_WITHIN
        assert_nothing_is_left(processes)


@pytest.mark.parametrize("delay", [0.0, 0.4, 1.0])
def test_a_peer_that_is_starting_leaves_too(founded: Swarm, llama: Path, delay: float) -> None:
    peer = founded.launch("serve", str(llama), *LOCAL, "--initial-peers", founded.initial_peers[0])
    time.sleep(0.2 + delay)
    processes = [psutil.Process(peer.pid), *psutil.Process(peer.pid).children(recursive=True)]
    assert peer.stop(signal.SIGTERM) < LEAVES_WITHIN
    assert_nothing_is_left(processes)
    assert "Traceback" not in peer.stderr.read_text()


def test_a_killed_peer_leaves_no_process(founded: Swarm, llama: Path) -> None:
    founded.serve(llama, "0:1")
    processes = family(founded.peers[1].pid)
    founded.peers[1].kill()
    assert psutil.wait_procs(processes, 5)[1] == []


def test_a_member_whose_p2pd_dies_says_so(command: Command) -> None:
    def kill_p2pd() -> None:
        before = set(psutil.Process().children(recursive=True))
        while not (found := [p for p in set(psutil.Process().children(recursive=True)) - before if p.name() == "p2pd"]):
            time.sleep(0.05)
        time.sleep(1.0)
        found[0].kill()

    killer = threading.Thread(target=kill_p2pd)
    killer.start()
    outcome = command("bootstrap", *LOCAL)
    killer.join()
    assert outcome.code == 1
    assert "error: The p2pd process died; start this node again." in outcome.stderr


# Which blocks, which model, which name


def test_a_new_peer_takes_the_blocks_that_lack(founded: Swarm, llama: Path) -> None:
    founded.serve(llama, "0:2")
    join = [*LOCAL, "--initial-peers", founded.initial_peers[0]]
    hole = founded.launch("serve", str(llama), "--num-blocks", "2", *join)
    hole.wait_ready()
    assert hole.blocks == range(2, 4)
    everything = founded.launch("serve", str(llama), *join)
    everything.wait_ready()
    assert everything.blocks == range(0, 5)


def test_an_identity_file_keeps_the_peer_id(swarm: Swarm, tmp_path: Path) -> None:
    identity = tmp_path / "node.key"
    known = []
    for _ in range(2):
        node = swarm.launch("bootstrap", *LOCAL, "--identity", str(identity))
        node.wait_ready()
        known.append(node.peer_id)
        other = swarm.launch("bootstrap", *LOCAL, "--identity", str(identity))
        with pytest.raises(AssertionError, match="did not get ready: error: "):
            other.wait_ready()
        node.stop()
    assert known[0] == known[1]
    assert identity.stat().st_mode & 0o077 == 0


def test_options_stand_in_a_file(founded: Swarm, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "peer.yaml"
    file.write_text(
        f"model: {llama}\nblocks: 1:3\nhost: 127.0.0.1\nname: from file\nmax-length: 77\nquantize: nf4\n"
        f"double-quantize: yes\ninitial-peers: {founded.initial_peers[0]}\n"
    )
    founded.launch("serve", "--config", str(file)).wait_ready()
    founded.launch("serve", "--config", str(file), "--blocks", "3:5", "--name", "given").wait_ready()
    with observer(founded) as member:
        seen = {peer.name: peer for peer in announced(member, llama)}
    assert (seen["from file"].start, seen["from file"].end) == (1, 3)
    assert (seen["given"].start, seen["given"].end) == (3, 5)
    assert {(peer.max_length, peer.quantization) for peer in seen.values()} == {(77, "nf4")}


def test_serve_without_a_model_joins_the_only_one(
    founded: Swarm, llama: Path, models: Callable[[str], Path], command: Command, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    join = [*LOCAL, "--initial-peers", founded.initial_peers[0]]
    assert "The swarm serves 0 models" in command("serve", *join).refusal()
    founded.serve(llama, "0:2")
    monkeypatch.chdir(shutil.copytree(models("opt"), tmp_path / "llama").parent)
    said = command("serve", "--blocks", "2:4", *join).refusal()
    assert "What is called 'llama' here is another model" in said
    monkeypatch.chdir(llama.parent)
    with observer(founded) as member:
        leaving = threading.Thread(target=leave_when, args=(lambda: len(announced(member, llama)) == 2,))
        leaving.start()
        outcome = command("serve", "--num-blocks", "3", *join)
        leaving.join()
    assert outcome.code == 0
    assert outcome.stdout.endswith(" blocks=2:5 model=llama\n")
    founded.serve(models("opt"), "0:1")
    assert "The swarm serves 2 models (llama, opt)" in command("serve", *join).refusal()


def leave_when(condition: Callable[[], bool]) -> None:
    """Ctrl-C for this process's own command."""
    while not condition():
        time.sleep(0.1)
    time.sleep(0.5)  # for the line that says it is ready, which follows
    os.kill(os.getpid(), signal.SIGTERM)


# Looking


@pytest.fixture(scope="module")
def spoken(fork_server: ForkServer, llama: Path) -> Iterator[Swarm]:
    """The small llama with a tokenizer over two peers."""
    with new_swarm(fork_server) as swarm:
        swarm.serve(llama, "0:2", options=["--name", "[/red]alpha"])
        swarm.serve(llama, "2:5", options=["--quantize", "none", "--max-length", "50", "--cache-tokens", "100"])
        yield swarm


def test_status_shows_who_serves_what(spoken: Swarm, command: Command) -> None:
    outcome = command("status", "--initial-peers", spoken.initial_peers[0])
    assert outcome.code == 0
    assert "llama: 5 blocks, 2 peers" in outcome.stdout
    assert "All 5 blocks are served." in outcome.stdout
    first, second = [line for line in outcome.stdout.splitlines() if "online" in line]
    assert "0:2" in first
    assert "[/red]alpha" in first
    assert "2:5" in second
    assert spoken.peers[1].peer_id[-8:] in second
    assert "float32" in second
    first, second = [line for line in outcome.stdout.splitlines() if "0.0% of" in line]
    assert first.startswith(" [/red]alpha") or first.startswith("[/red]alpha")
    assert second.count("0.0% of") == 3


def test_status_fits_a_screen_and_cuts_nothing(
    spoken: Swarm, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    shown = command("status", "--initial-peers", spoken.initial_peers[0]).stdout
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["blocks", "peer", "state", "weights", "tok/s", "tok/s", "free", "users"]


def test_status_as_json(spoken: Swarm, llama: Path, command: Command) -> None:
    for name in ([], ["llama"], [str(llama)]):
        outcome = command("status", *name, "--json", "--initial-peers", spoken.initial_peers[0])
        assert outcome.code == 0
        (model,) = json.loads(outcome.stdout)
        assert (model["model"], model["num_blocks"], model["holes"]) == ("llama", 5, [])
        first, second = model["peers"]
        assert (first["start"], first["end"], first["peer_id"]) == (0, 2, spoken.peers[0].peer_id)
        assert (second["start"], second["end"], second["state"]) == (2, 5, "online")
        assert (second["free_cache_tokens"], second["max_length"], second["sessions"]) == (100, 50, 0)
        assert second["speed"]["decode"] > 0
        assert {name: share["used"] for name, share in second["memory"].items()} == {
            "cache": 0,
            "kept": 0,
            "adapters": 0,
        }
        assert 0 < second["memory"]["cache"]["total"] < second["memory"]["kept"]["total"]
        assert second["addresses"] == [spoken.peers[1].address]


def test_status_shows_holes(founded: Swarm, llama: Path, command: Command) -> None:
    join = ["--initial-peers", founded.initial_peers[0]]
    assert "No peer serves any model" in command("status", *join).stdout
    assert json.loads(command("status", "--json", *join).stdout) == []
    founded.serve(llama, "1:2", "3:4")
    assert "HOLES: nobody serves blocks 0:1, 2:3, 4:5" in command("status", *join).stdout
    (model,) = json.loads(command("status", "--json", *join).stdout)
    assert model["holes"] == [[0, 1], [2, 3], [4, 5]]


# Text


class _Screen:
    """What is written to it, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        if text:
            self.pieces.append(text)
        return len(text)

    def flush(self) -> None:
        pass


PROMPT = "w5 w9 w33 w12"


def local_text(path: Path, adapter: Path | None = None, **options: Any) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=15, tokenizer=tokenizer, **options)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_streams_the_text_of_the_model(
    spoken: Swarm, llama: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = _Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    outcome = command("generate", llama, PROMPT, "--max-new-tokens", "15", "--initial-peers", spoken.initial_peers[0])
    assert outcome.code == 0
    assert "".join(screen.pieces).split() == local_text(llama).split()
    assert len(screen.pieces) >= len(local_text(llama).split()) > 4


GENERATION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "beams": ({"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 3}),
    "beams in a dictionary": (
        {"num_beams": 2, "return_dict_in_generate": True, "output_scores": True},
        {"num_beams": 2},
    ),
    "sequences": ({"do_sample": True, "num_return_sequences": 2}, {}),
    "a static cache": ({"cache_implementation": "static"}, {}),
}
"""What a checkpoint asks for, and what `peer generate` then does of it."""


@pytest.mark.parametrize("asked", GENERATION)
def test_generate_does_what_a_checkpoint_asks_for_or_says_that_it_does_not(
    asked: str, spoken: Swarm, llama: Path, command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, done = GENERATION[asked]
    folder = shutil.copytree(llama, tmp_path / "llama")
    (folder / "generation_config.json").write_text(json.dumps(file | {"eos_token_id": 2}))
    outcome = command("generate", folder, PROMPT, "--max-new-tokens", "15", "--initial-peers", spoken.initial_peers[0])
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.split() == local_text(llama, **done).split()
    for name in file.keys() - done.keys() & {"num_return_sequences", "cache_implementation"}:
        assert f"generation_config.json asks for {name}=" in caplog.text


def test_generate_says_what_it_cannot_do(spoken: Swarm, llama: Path, command: Command, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    (folder / "generation_config.json").write_text(json.dumps({"dola_layers": "high"}))
    said = command("generate", folder, PROMPT, "--initial-peers", spoken.initial_peers[0]).refusal()
    assert "generation_config.json asks for what cannot be done here" in said


def test_generate_with_an_adapter_and_by_chance(spoken: Swarm, llama: Path, command: Command, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_alpha=64)
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path)
    ask = ["generate", llama, PROMPT, "--max-new-tokens", "15", "--initial-peers", spoken.initial_peers[0]]
    adapted = command(*ask, "--adapter", tmp_path).stdout.split()
    assert adapted == local_text(llama, tmp_path).split()
    assert adapted != local_text(llama).split()
    sampled = [command(*ask, "--temperature", "1.5", "--seed", seed).stdout for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_with_an_adapter_and_what_it_was_trained_with(
    spoken: Swarm, llama: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its revision of the base, which the swarm serves, and its tokenizer with its chat template."""
    main, adapter = shutil.copytree(llama, tmp_path / "main"), tmp_path / "adapter"
    other = transformers.AutoModelForCausalLM.from_pretrained(llama)
    other.get_output_embeddings().weight.data.neg_()
    other.save_pretrained(main, max_shard_size="60KB")
    keep_revisions(tmp_path / "hub", "acme/llama", {"main": main, "dev": llama}, monkeypatch)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_alpha=64)
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(adapter)
    described = json.loads((adapter / "adapter_config.json").read_text())
    described |= {"base_model_name_or_path": "acme/llama", "revision": "dev"}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    ask = ["--adapter", adapter, "--max-new-tokens", "15", "--initial-peers", spoken.initial_peers[0]]
    told = command("generate", "acme/llama", PROMPT, *ask)
    assert (told.code, told.stderr) == (0, ""), told
    assert told.stdout.split() == local_text(llama, adapter).split()
    assert "has no chat template" in command("generate", "acme/llama", PROMPT, "--chat", *ask).refusal()
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    asked = command("generate", llama, PROMPT, "--chat", *ask)
    assert asked.stdout.split() == local_text(llama, adapter).split()
    assert asked.stderr == "Note that the adapter was trained on revision dev of acme/llama; expected that in " + (
        f"{llama}.\n"
    )


def test_every_command_explains_itself(command: Command) -> None:
    commands = (
        "serve",
        "bootstrap",
        "status",
        "generate",
        "tune",
        "merge",
        "demo",
        "swarm",
        "invite",
        "join",
        "members",
    )
    overview = command("--help")
    assert overview.code == 0
    for name in commands:
        assert re.search(rf"\b{name}\b", overview.stdout)
        assert command(name, "--help").code == 0
    unknown = command("serv")
    assert unknown.code == 2
    assert "No such command" in unknown.stderr
