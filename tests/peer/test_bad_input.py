"""Every mistake gets one clear sentence and exit code 2, or a typed exception; peers serve on."""

import json
import multiprocessing
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from client import AutoDistributedModelForCausalLM
from peer.span.checks import check_inputs
from peer.span.loading import load_span
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.errors import BadUsage, NoRoute, PeerFull, PeerUnreachable, TooLong, UnsupportedModel, WrongModel
from protocol.model.checkpoint import open_checkpoint
from tests.tools.command import Command
from tests.tools.damage import CONFIG, INDEX, edit
from tests.tools.families import build_small, short
from tests.tools.members import SOMEBODY
from tests.tools.swarm import ForkServer, Swarm, new_swarm

IDS = torch.arange(3, 11)[None]


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return shutil.copytree(llama, tmp_path / "damaged")


@pytest.fixture(scope="module")
def served(fork_server: ForkServer, llama: Path) -> Iterator[Swarm]:
    """Blocks 0:3 of the small llama, in sessions of 32 tokens."""
    with new_swarm(fork_server) as swarm:
        swarm.serve(llama, "0:3", options=["--max-length", "32", "--cache-tokens", "128"])
        yield swarm


# Options


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ("abc", "START:END, such as 0:12"),
        ("3", "START:END"),
        ("0-3", "START:END"),
        ("0:", "START:END"),
        (":3", "START:END"),
        ("-1:2", "START:END"),
        ("0:1:2", "START:END"),
        ("0:123456", "START:END"),
        ("", "START:END"),
        ("0:0", "is empty"),
        ("4:2", "is empty"),
        ("0:6", "the model has blocks 0:5"),
        ("7:9", "the model has blocks 0:5"),
    ],
)
def test_blocks_that_are_none(command: Command, llama: Path, blocks: str, said: str) -> None:
    assert said in command("serve", llama, f"--blocks={blocks}").refusal()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--blocks", "0:2", "--num-blocks", "2"], "not both"),
        (["--quantize", "int3"], "expected one of none, int8, nf4"),
        (["--quantize", "int8", "--double-quantize"], "--quantize nf4 only"),
        (["--dtype", "float8"], "expected one of auto, float32, bfloat16, float16"),
        (["--device", "toaster"], "The device 'toaster' cannot be used"),
        (["--device", "cuda:99"], "The device 'cuda:99' cannot be used"),
        (["--device", "cpu,cpu", "--blocks", "0:4"], "--device names 2 devices and --blocks 0:4 1 span(s)"),
        (["--device", "cpu,cpu", "--blocks", "0:2,4"], "--blocks '4' is not a span"),
        (
            ["--device", "cpu,cpu", "--announce", "/ip4/10.0.0.1/tcp/1"],
            "are of one peer; give a command for each device",
        ),
        (["--memory", "much"], "--memory 'much' is no amount of memory; expected GB, such as 10, or percent: 50%"),
        (["--memory", "101%"], "is no amount of memory"),
        (["--memory", "0"], "is no amount of memory"),
        (["--host", "example.org"], "is not an IP address"),
        (["--host", "192.0.2.1"], "Cannot listen on 192.0.2.1"),
        (["--announce", "here"], "cannot be announced"),
        (["--announce", "/ip4/10.0.0.1"], "'/ip4/10.0.0.1' cannot be announced; expected one like"),
        (["--announce", "/ip4/10.0.0.1/tcp/1"] * 21, "21 addresses to announce are too many; give 20 at most"),
        (["--num-blocks", "99"], "--num-blocks 99 is out of range: the model has 5 blocks"),
        (["--announce-direct", "here"], "no address for direct connections"),
        (["--name", "\x1b[2J"], "100 printable characters"),
        (["--name", "n" * 101], "100 printable characters"),
        (["--identity", "/proc/version"], "/proc/version"),
        (["--identity", "/nonexistent/folder/key"], "/nonexistent/folder"),
    ],
)
def test_options_that_are_wrong(command: Command, llama: Path, arguments: list[str], said: str) -> None:
    assert said in command("serve", llama, "--host", "127.0.0.1", *arguments).refusal()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "70000"],
        ["--direct-port", "70000"],
        ["--num-blocks", "0"],
        ["--max-length", "x"],
        ["--threads", "99999999999"],
        ["--bloks", "0:2"],
        ["a", "b"],
    ],
)
def test_options_that_are_none(command: Command, llama: Path, arguments: list[str]) -> None:
    outcome = command("serve", llama, *arguments)
    assert outcome.code == 2
    assert "Usage" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not outcome.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name: \xe9", "cannot be read as YAML ('utf-8' codec"),
        ("bloks: 0:2", "'bloks' is no option of `peer serve`. Did you mean 'blocks'?"),
        ("cache-token: 3", "Did you mean 'cache_tokens'?"),
        ("compil: yes", "Did you mean 'compile'?"),
        ("zzz: 3", "'zzz' is no option of `peer serve`."),
        ("[blocks]", "must hold a mapping"),
        ("blocks: [", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_of_options(command: Command, llama: Path, tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "options.yaml"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    assert said in command("serve", llama, "--config", file).refusal()


def test_an_option_in_a_file_has_the_name_that_people_type(command: Command, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("compile: yes\nblocks: 0:9\nhost: 127.0.0.1\n")
    assert "0:9 is out of range" in command("serve", llama, "--config", file).refusal()
    file.write_text("json: yes\ninitial-peers: here\n")
    assert "'here' is not the address of a peer" in command("status", "--config", file).refusal()


def test_an_option_in_a_file_is_checked_like_any_other(command: Command, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("blocks: 0:9\nhost: 127.0.0.1\n")
    assert "0:9 is out of range" in command("serve", llama, "--config", file).refusal()
    file.write_text("port: many\n")
    outcome = command("serve", llama, "--config", file)
    assert outcome.code == 2
    assert "Invalid value for '--port'" in outcome.stderr


# Initial peers


@pytest.mark.parametrize(
    "address", ["", "here", "/ip4/127.0.0.1/tcp/4000", "/ip4/1.2.3/tcp/1/p2p/" + SOMEBODY, SOMEBODY]
)
def test_an_initial_peer_that_is_no_address(command: Command, llama: Path, address: str) -> None:
    for name in (["serve", llama], ["serve"], ["bootstrap"], ["status"], ["generate", llama, "w5"]):
        said = command(*name, "--initial-peers", address).refusal()
        assert "is not the address of a peer; expected one like /ip4/" in said
    with pytest.raises(BadUsage, match="is not the address of a peer"):
        AutoDistributedModelForCausalLM.from_pretrained(str(llama), initial_peers=[address])


def test_no_initial_peer(command: Command, llama: Path) -> None:
    for arguments in (["status"], ["serve"]):
        assert "--initial-peers" in command(*arguments).refusal()
    for given in ({}, {"initial_peers": []}):
        with pytest.raises(BadUsage, match="initial_peers"):
            AutoDistributedModelForCausalLM.from_pretrained(str(llama), **given)


def test_an_initial_peer_that_nobody_is(command: Command, llama: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{SOMEBODY}"
    for arguments in (["serve", llama, "--blocks", "0:1"], ["bootstrap"], ["status"], ["generate", llama, "w5"]):
        begin = time.monotonic()
        assert address in command(*arguments, "--initial-peers", address).refusal()
        assert time.monotonic() - begin < 15
    with pytest.raises(PeerUnreachable, match=f"{port}.*refused"):
        AutoDistributedModelForCausalLM.from_pretrained(str(llama), initial_peers=[address])


def test_an_initial_peer_that_is_silent(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}/p2p/{SOMEBODY}"
        begin = time.monotonic()
        assert address in command("status", "--initial-peers", address).refusal()
        assert time.monotonic() - begin < 15


def test_an_initial_peer_that_is_another(command: Command, served: Swarm) -> None:
    address = served.initial_peers[0].replace(served.peers[0].peer_id, SOMEBODY)
    assert SOMEBODY in command("status", "--initial-peers", address).refusal()


# Model folders


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def truncate(folder: Path) -> None:
    shard = shard_of(folder, WEIGHT)
    shard.write_bytes(shard.read_bytes()[:-100])


def forget(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    del weight_map[WEIGHT]
    edit(INDEX, weight_map=weight_map)(folder)


def misplace(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    weight_map[WEIGHT] = weight_map["model.norm.weight"]
    edit(INDEX, weight_map=weight_map)(folder)


WEIGHT = "model.layers.1.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no config.json"),
    "config is no JSON": (write(CONFIG, "{"), "not readable as JSON"),
    "config is a list": (write(CONFIG, "[]"), "holds no JSON object"),
    "config of nothing": (write(CONFIG, "{}"), "does not describe a language model"),
    "config of an unknown family": (edit(CONFIG, model_type="perpetuum"), "does not describe a language model"),
    "config of nonsense": (edit(CONFIG, hidden_size="wide"), "does not describe a language model"),
    "config of no blocks": (edit(CONFIG, num_hidden_layers=0), "describes a model of 0 blocks"),
    "config of heads that do not divide": (edit(CONFIG, num_attention_heads=5, head_dim=None), "config.json"),
    "config of other sizes": (
        edit(CONFIG, intermediate_size=96),
        "has shape [32, 64] and the configuration says [32, 96]",
    ),
    "index is no JSON": (write(INDEX, "{"), "not readable as JSON"),
    "index without a map": (edit(INDEX, weight_map=None), "weight_map"),
    "index of nonsense": (edit(INDEX, weight_map={WEIGHT: 7}), "weight_map"),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("*.safe*")], "neither model.safetensors nor"),
    "a missing shard": (lambda folder: shard_of(folder, WEIGHT).unlink(), "lacks its shard model-"),
    "a truncated shard": (truncate, "not a whole safetensors file"),
    "an empty shard": (lambda folder: shard_of(folder, WEIGHT).write_bytes(b""), "not a whole safetensors file"),
    "a shard of text": (lambda folder: shard_of(folder, WEIGHT).write_text("x" * 99), "not a whole safetensors file"),
    "a tensor in no shard": (forget, f"lacks weights of blocks 0:2, such as {WEIGHT}"),
    "a tensor in another shard": (misplace, "no shard holds"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_folder(command: Command, copy: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(copy)
    assert said in command("serve", copy, "--blocks", "0:2", "--host", "127.0.0.1").refusal()


@pytest.mark.parametrize("name", ["/nonexistent/model", "./nonexistent", "nonexistent/model", "no such model", "a/b/c"])
def test_a_model_that_is_not_there(command: Command, name: str, served: Swarm) -> None:
    assert "has no config.json; expected a Hugging Face model folder" in command("serve", name).refusal()
    with pytest.raises(UnsupportedModel, match=r"has no config\.json"):
        served.connect(name)


def test_a_client_of_a_damaged_model_folder(copy: Path, served: Swarm) -> None:
    shard_of(copy, "lm_head.weight").unlink()
    with pytest.raises(UnsupportedModel, match="lacks its shard"):
        served.connect(copy)
    (copy / CONFIG).write_text("{}")
    with pytest.raises(UnsupportedModel, match="does not describe a language model"):
        served.connect(copy)


@pytest.mark.parametrize("content", ["{", "[]", '{"max_new_tokens": "many"}', "\xe9"])
def test_a_damaged_generation_config(copy: Path, served: Swarm, content: str) -> None:
    (copy / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(
        UnsupportedModel, match=r"generation_config\.json cannot be used \(.*\); download the model again"
    ):
        served.connect(copy)


_TINY: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3}
REFUSED: dict[str, transformers.PreTrainedConfig] = {
    "mamba": transformers.MambaConfig(**_TINY, state_size=4),
    "falcon_h1": transformers.FalconH1Config(
        **_TINY, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4,
        mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
    ),
    "recurrent_gemma": transformers.RecurrentGemmaConfig(
        **_TINY, intermediate_size=64, num_attention_heads=4, lru_width=32
    ),
    "minimax": transformers.MiniMaxConfig(
        **_TINY, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2
    ),
    "t5": transformers.T5Config(vocab_size=64, d_model=32, d_ff=64, num_layers=3, num_heads=4, d_kv=8),
    "bert": transformers.BertConfig(**_TINY, intermediate_size=64, num_attention_heads=4),
    "vit": transformers.ViTConfig(hidden_size=32, num_hidden_layers=3, intermediate_size=64, num_attention_heads=4),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_an_architecture_that_spans_cannot_serve(command: Command, tmp_path: Path, family: str) -> None:
    folder = tmp_path / family
    transformers.AutoModel.from_config(REFUSED[family]).save_pretrained(folder)
    said = command("serve", folder, "--blocks", "0:2", "--host", "127.0.0.1").refusal()
    assert "cannot be served" in said or "expected a" in said


# Swarms


def test_a_client_of_another_model(served: Swarm, models: Callable[[str], Path], llama: Path) -> None:
    model = served.connect(models("opt"))
    with pytest.raises(NoRoute, match="This swarm serves llama, and not opt"):
        model(input_ids=IDS)


def test_a_client_of_another_revision(served: Swarm, llama: Path, copy: Path) -> None:
    for file in copy.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    model = served.connect(copy)
    with pytest.raises(WrongModel, match="same revision"):
        model.swarm.blocks(torch.zeros(1, 2, 32), 0, 3)
    assert served.connect(llama).swarm.blocks(torch.zeros(1, 2, 32), 0, 3).shape == (1, 2, 32)


def test_blocks_that_nobody_serves(served: Swarm, llama: Path, command: Command) -> None:
    model = served.connect(llama)
    for run in (lambda: model(input_ids=IDS), lambda: model.generate(input_ids=IDS), lambda: model.swarm.route()):
        with pytest.raises(NoRoute, match=r"Blocks 3:5 are served by nobody.*peer serve"):
            run()
    assert model.swarm.blocks(torch.zeros(1, 2, 32), 0, 3).shape == (1, 2, 32)
    with pytest.raises(BadUsage, match=r"Blocks 0:6 do not lie in this model's 0:5"):
        model.swarm.blocks(torch.zeros(1, 2, 32), 0, 6)


@pytest.fixture(scope="module")
def small(fork_server: ForkServer, llama: Path) -> Iterator[Swarm]:
    """The whole small llama, in sessions of 32 tokens."""
    with new_swarm(fork_server) as swarm:
        swarm.serve(llama, "0:5", options=["--max-length", "32", "--cache-tokens", "128"])
        yield swarm


def test_a_prompt_that_is_too_long(small: Swarm, llama: Path) -> None:
    model = small.connect(llama)
    long = torch.arange(3, 43)[None]
    for run in (model.generate, lambda input_ids: model(input_ids=input_ids, use_cache=False)):
        with pytest.raises(TooLong, match=r"40 tokens are longer than this peer allows \(32\); shorten"):
            run(input_ids=long)
    greedy = {"do_sample": False, "eos_token_id": None}
    with pytest.raises(TooLong, match="33 tokens"):
        model.generate(input_ids=IDS, max_new_tokens=30, **greedy)
    assert model.generate(input_ids=IDS, max_new_tokens=24, **greedy).shape == (1, 32)


@pytest.mark.parametrize("family", ["mpt", "gptj"])
def test_a_prompt_beyond_the_models_own_tables(family: str, swarm: Swarm, tmp_path: Path) -> None:
    """No peer could compute it: none is tried after the first, and none kept away from."""
    path = build_small(tmp_path / family, short(family, 16))
    swarm.serve(path, "0:2")
    model = swarm.connect(path)
    for run in (partial(model.generate, max_new_tokens=2), partial(model, use_cache=False)):
        begin = time.monotonic()
        with pytest.raises(TooLong, match="cannot compute more than 16 tokens; shorten the prompt"):
            run(input_ids=torch.arange(3, 23)[None])
        assert time.monotonic() - begin < 5
    assert model.generate(input_ids=IDS, max_new_tokens=4, eos_token_id=None).shape == (1, 12)


@pytest.mark.parametrize("position", [-1, 16, 2**40])
def test_positions_beyond_the_models_own_tables(tmp_path: Path, position: int) -> None:
    """Are refused before they reach the blocks: a GPU that reads beyond a table is lost to the peer."""
    span = load_span(open_checkpoint(str(build_small(tmp_path / "gptj", short("gptj", 16)))), 0, 2)
    hidden, positions = torch.zeros(1, 2, 32), torch.tensor([[0, position]])
    message = Message(pb.Forward(), {"hidden_states": hidden, "position_ids": positions})
    with pytest.raises(TooLong, match="cannot compute more than 16 tokens"):
        check_inputs(span, message, 0, 64)
    plain = Message(pb.Forward(), {"hidden_states": hidden})
    assert check_inputs(span, plain, 14, 64).positions is None
    with pytest.raises(TooLong, match="cannot compute more than 16 tokens"):
        check_inputs(span, plain, 15, 64)


def test_a_peer_that_is_full(small: Swarm, llama: Path) -> None:
    model, other = small.connect(llama), small.connect(llama, max_attempts=2)
    held = model(input_ids=IDS.expand(16, -1), use_cache=True).past_key_values
    with torch.no_grad():
        with pytest.raises(PeerFull, match=r"has \d+ of 128 tokens free, \d+ more are needed; try again later"):
            other.generate(input_ids=IDS.expand(17, -1), max_new_tokens=2)
        assert model.generate(input_ids=IDS, max_new_tokens=2, eos_token_id=None).shape == (1, 10)
    assert held.get_seq_length() == IDS.shape[1]  # what lay idle gave way


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_model_from_before_a_fork(small: Swarm, llama: Path) -> None:
    model = small.connect(llama)
    answers, answer = multiprocessing.Pipe(duplex=False)

    def call() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(BadUsage) as refused:
                model(input_ids=IDS)
        answer.send((str(refused.value), [str(warning.message) for warning in caught]))

    child = multiprocessing.get_context("fork").Process(target=call)
    child.start()
    try:
        assert answers.poll(20)
        assert answers.recv() == (
            "This process was forked from the one that loaded the model; load the model after the fork.",
            [],
        )
    finally:
        child.kill()
        child.join()
    assert model(input_ids=IDS).logits.shape == (1, 8, 128)


ADAPTER, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-9]), "deserializing"),
    "a list": (write(ADAPTER, "[]"), "list"),
    "a module of nonsense": (edit(ADAPTER, target_modules=5), "'int' object"),
    "a rank of nonsense": (edit(ADAPTER, r="eight"), "'str'"),
    "of another model": (
        lambda folder: save_file(
            {name: torch.zeros(3, 7) for name in load_file(folder / TENSORS)}, folder / TENSORS, {"format": "pt"}
        ),
        "it was trained on another model: its tensor model.layers.0.self_attn.q_proj.lora_A.weight is [3, 7], and here "
        "it must be [2, 32]",
    ),
    "of a resized model": (edit(ADAPTER, trainable_token_indices=[128]), "it trains tokens that the model has"),
}


@pytest.mark.parametrize(("damage", "said"), BROKEN.values(), ids=BROKEN)
def test_an_adapter_that_cannot_be_used(
    command: Command, served: Swarm, llama: Path, tmp_path: Path, damage: Callable[[Path], Any], said: str
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path)
    damage(tmp_path)
    refusal = command(
        "generate", llama, "w5", "--adapter", tmp_path, "--initial-peers", served.initial_peers[0]
    ).refusal()
    assert f"--adapter {tmp_path} cannot be put on" in refusal
    assert said in refusal


def test_commands_of_a_client(
    command: Command, served: Swarm, small: Swarm, llama: Path, models: Callable[[str], Path], tmp_path: Path
) -> None:
    joined = ["--initial-peers", served.initial_peers[0]]
    assert "has no tokenizer" in command("generate", models("llama"), "w5", *joined).refusal()
    assert "No peer serves 'opt'" in command("status", "opt", *joined).refusal()
    assert "--initial-peers" in command("generate", llama, "w5").refusal()
    unseeded = command("generate", llama, "w5", "--seed", str(2**64), *joined)
    assert (unseeded.code, "Invalid value for '--seed'" in unseeded.stderr) == (2, True)
    assert "The prompt is empty" in command("generate", llama, "", *joined).refusal()
    assert "no chat template" in command("generate", llama, "w5", "--chat", *joined).refusal()
    assert "expected one of float32" in command("generate", llama, "w5", "--dtype", "float9", *joined).refusal()
    assert "The device 'gpu' cannot be used" in command("generate", llama, "w5", "--device", "gpu", *joined).refusal()
    said = command("generate", llama, "w5", "--adapter", "/nonexistent", *joined).refusal()
    assert "--adapter /nonexistent cannot be put on" in said
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    said = command("generate", llama, "w5", "--adapter", tmp_path, *joined).refusal()
    assert said.endswith(f"it has no adapter_config.json; did you mean {tmp_path / 'adapter'}?")
    long = " ".join(["w5"] * 40)
    said = command("generate", llama, long, "--initial-peers", small.initial_peers[0]).refusal()
    assert "40 tokens are longer than this peer allows (32)" in said
    lacking = command("generate", llama, "w5", *joined)
    assert lacking.code == 1  # no mistake of the user's
    assert lacking.stderr.startswith("error: Blocks 3:5 are served by nobody")
