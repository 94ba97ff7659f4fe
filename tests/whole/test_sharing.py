"""Many users of few peers: spans that overlap or are used in part, clients and adapters at once, without cross-talk."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from protocol.errors import BadUsage, NoRoute
from tests.tools.swarm import ForkServer, Swarm, new_swarm
from tests.tools.threads import run_at_once

VOCABULARY, BLOCKS, HIDDEN = 128, 5, 32


@pytest.fixture(scope="module")
def shared(fork_server: ForkServer, models: Callable[[str], Path]) -> Iterator[tuple[Path, Swarm]]:
    """Two peers whose spans overlap; neither holds the whole model."""
    with new_swarm(fork_server) as swarm:
        swarm.serve(models("llama"), "0:4", "2:5")
        yield models("llama"), swarm


Connect = Callable[..., Any]


@pytest.fixture(scope="module")
def connect(shared: tuple[Path, Swarm]) -> Connect:
    path, swarm = shared
    return lambda **options: swarm.connect(path, **options)


@pytest.fixture(scope="module")
def local(shared: tuple[Path, Swarm]) -> Connect:
    return lambda: transformers.AutoModelForCausalLM.from_pretrained(shared[0]).eval()


def batch(seed: int = 1, rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_lora(model: Any, seed: int = 7, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**config | options))


def generate(model: Any, seed: int = 1, tokens: int = 12) -> torch.Tensor:
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    return model.eval().generate(**batch(seed), **options)  # type: ignore[no-any-return]


def loss_of(model: Any, seed: int = 1, rows: int = 3) -> torch.Tensor:
    inputs = batch(seed, rows)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(**inputs, labels=labels).loss  # type: ignore[no-any-return]


def train(model: Any, seed: int = 1, steps: int = 6) -> list[torch.Tensor]:
    """The losses of a few steps, then the parameters."""
    parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(steps):
        losses.append(loss_of(model, seed + step))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*(loss.detach() for loss in losses), *(parameter.detach() for parameter in parameters)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


# ---- spans


def test_a_route_over_overlapping_spans(connect: Connect, local: Connect, shared: tuple[Path, Swarm]) -> None:
    model = connect()
    peers = {peer.peer_id: peer for peer in model.swarm.peers()}
    assert {(peer.start, peer.end) for peer in peers.values()} == {(0, 4), (2, 5)}
    assert set(peers) == {peer.peer_id for peer in shared[1].peers}
    for purpose in ("decode", "forward"):
        route = model.swarm.route(purpose)
        assert [hop.start for hop in route] == [0, *(hop.end for hop in route[:-1])]
        assert route[-1].end == BLOCKS
        assert all(hop.peer.start <= hop.start < hop.end <= hop.peer.end for hop in route)
        assert any((hop.start, hop.end) != (hop.peer.start, hop.peer.end) for hop in route)  # used in part
    assert torch.equal(generate(model), generate(local()))
    assert same(train(with_lora(model)), train(with_lora(local())))


def blocks_locally(model: Any, hidden: torch.Tensor, start: int, end: int, **inputs: Any) -> torch.Tensor:
    model.model.layers = model.model.layers[start:end]
    model.model.norm = torch.nn.Identity()
    return model.model(inputs_embeds=hidden, use_cache=False, **inputs).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize(("start", "end"), [(0, 5), (1, 4), (2, 3), (3, 5), (0, 1)])
def test_any_range_of_blocks(start: int, end: int, connect: Connect, local: Connect) -> None:
    """`model.swarm.blocks` equals running these blocks here, and so do its gradients; an adapter's included."""
    mask = batch()["attention_mask"]
    results = []
    for model in (local(), connect()):
        tuned = with_lora(model).eval()
        torch.manual_seed(3)
        hidden = torch.randn(3, 12, HIDDEN, requires_grad=True)
        if hasattr(model, "swarm"):
            assert len(model.swarm.blocks) == BLOCKS
            output = model.swarm.blocks(hidden, start, end, attention_mask=mask)
            own = [p for n, p in tuned.named_parameters() if "lora" in n and int(n.split(".")[4]) in range(start, end)]
        else:
            own = [p for n, p in tuned.named_parameters() if "lora" in n and int(n.split(".")[4]) in range(start, end)]
            output = blocks_locally(model, hidden, start, end, attention_mask=mask)
        (output * mask[:, :, None]).square().sum().backward()
        seen = mask.bool()
        results.append([output[seen].detach(), hidden.grad, *(parameter.grad for parameter in own)])
        assert len(own) == 4 * (end - start)
    assert same(*results)


def test_a_custom_path_through_the_model(connect: Connect, local: Connect) -> None:
    """Blocks 1 and 2 run twice, with something of the user's own in between."""
    remote, reference = connect(), local()
    hidden = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(3), requires_grad=True)
    blocks = remote.swarm.blocks
    output = blocks(torch.tanh(blocks(hidden, 0, 3)), 1, 3)
    (gradient,) = torch.autograd.grad(output.sum(), hidden)

    layers = reference.model.layers
    once = blocks_locally(reference, hidden, 0, 3)
    reference.model.layers = layers
    expected = blocks_locally(reference, torch.tanh(once), 1, 3)
    assert torch.equal(output, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), hidden)[0])


def test_ranges_that_are_not_there(connect: Connect) -> None:
    blocks = connect().swarm.blocks
    for start, end in ((3, 9), (2, 2), (-1, 3)):
        with pytest.raises(BadUsage, match=f"Blocks {start}:{end} do not lie in this model's 0:5"):
            blocks(torch.zeros(1, 2, HIDDEN), start, end)


def test_peers_that_are_not_to_be_used(connect: Connect, shared: tuple[Path, Swarm]) -> None:
    first, second = (peer.peer_id for peer in shared[1].peers)
    hidden = torch.zeros(1, 2, HIDDEN)
    kept = connect(allowed_peers=[first])
    assert [peer.peer_id for peer in kept.swarm.peers()] == [first]
    kept.swarm.blocks(hidden, 0, 4)
    with pytest.raises(NoRoute, match="Blocks 4:5 are served by nobody"):
        kept(**batch())
    blocked = connect(blocked_peers=[first])
    assert [peer.peer_id for peer in blocked.swarm.peers()] == [second]
    blocked.swarm.blocks(hidden, 2, 5)
    with pytest.raises(NoRoute, match="Blocks 0:2 are served by nobody"):
        blocked.swarm.route()


def test_blocks_that_only_certain_peers_may_see(connect: Connect, local: Connect, shared: tuple[Path, Swarm]) -> None:
    first, second = (peer.peer_id for peer in shared[1].peers)  # 0:4 and 2:5
    for span, trusted, expected in (("2:4", second, [(0, 2), (2, 5)]), ("3:4", first, [(0, 4), (4, 5)])):
        pinned = connect(pins={span: [trusted]})
        assert [(hop.start, hop.end) for hop in pinned.swarm.route()] == expected
        assert torch.equal(pinned(**batch()).logits, local()(**batch()).logits)
    with pytest.raises(NoRoute, match="Blocks 0:1 are served by nobody"):
        connect(pins={"0:1": [second]}).swarm.route()


# ---- at once


def test_clients_at_once(connect: Connect, local: Connect) -> None:
    """Two generate, two train adapters of one shape but other values: each as if it were alone.

    To rounding where it trains: calls of both may go through the peers together, and Adam magnifies what is small.
    """
    made: list[tuple[Callable[..., Any], Callable[[Any], Any], int]] = [
        (generate, lambda model: model, 1),
        (generate, with_lora, 2),
        (train, with_lora, 3),
        (train, lambda model: with_lora(model, seed=8, lora_alpha=32), 4),
    ]
    works = [partial(work, prepare(connect()), seed) for work, prepare, seed in made]
    for result, (work, prepare, seed) in zip(run_at_once(*works), made, strict=True):
        atol = 0.0 if work is generate else 1e-4
        for ours, theirs in zip(result, work(prepare(local()), seed), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_one_model_in_several_threads(connect: Connect, local: Connect) -> None:
    model, plain = connect(), local()
    works = [partial(generate, model, seed, 8) for seed in range(4)]
    for seed, tokens in enumerate(run_at_once(*works)):
        assert torch.equal(tokens, generate(plain, seed, 8))


def test_sessions_that_take_turns(connect: Connect, local: Connect) -> None:
    """Two caches on one model, stepped in turns, while a third is dropped half-way."""

    @torch.no_grad()
    def turns(model: Any) -> list[torch.Tensor]:
        caches: list[Any] = [None, None, None]
        ids = [batch(seed)["input_ids"] for seed in range(3)]
        seen = []
        for step in range(6):
            for number in range(3 if step < 3 else 2):
                out = model(input_ids=ids[number], past_key_values=caches[number], use_cache=True)
                caches[number], ids[number] = out.past_key_values, out.logits[:, -1:].argmax(-1)
                seen.append(out.logits[:, -1])
            if step == 2:
                caches[2] = None
        return seen

    assert same(turns(connect()), turns(local()))


def test_two_adapters_interleaved_on_one_peer(connect: Connect, local: Connect) -> None:
    """Forward A, forward B, backward B, backward A; one module tree on the peer serves both."""

    def interleave(make: Connect) -> list[torch.Tensor]:
        one, other = with_lora(make(), 7).train(), with_lora(make(), 8, lora_alpha=32).train()
        losses = [loss_of(one, 1), loss_of(other, 2)]
        losses[1].backward()
        losses[0].backward()
        gradients = [p.grad for model in (one, other) for p in model.parameters() if p.requires_grad]
        return [*(loss.detach() for loss in losses), *gradients]

    ours, theirs = interleave(connect), interleave(local)
    assert same(ours, theirs)
    assert not torch.equal(ours[2], ours[2 + len(ours[2:]) // 2])


def test_client_processes_at_once(shared: tuple[Path, Swarm], connect: Connect, local: Connect, tmp_path: Path) -> None:
    """Two more processes generate by the command line while this one trains and generates."""
    path, swarm = shared
    tokenizer = _tokenizer()
    folder = shutil.copytree(path, tmp_path / "llama")
    tokenizer.save_pretrained(folder)
    prompts = ["w64 w40 w111", "w100 w90 w80"]
    options = ("--initial-peers", swarm.initial_peers[0], "--max-new-tokens", "40")
    children = [swarm.launch("generate", str(folder), prompt, *options) for prompt in prompts]
    plain, model, rounds = local(), connect(), 0
    expected_tokens, expected_run = generate(plain, 6, 8), train(with_lora(local()))
    while any(child.is_alive() for child in children) or not rounds:
        assert torch.equal(generate(model, 6, 8), expected_tokens)
        assert same(train(with_lora(connect())), expected_run)
        rounds += 1
    for child, prompt in zip(children, prompts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        said = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        assert said
        assert child.stdout.read_text().split() == said.split(), child.stderr.read_text()


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")


# ---- micro-batches


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_micro_batches(method: str, connect: Connect, local: Connect) -> None:
    """Split by rows, in flight at once: the loss and gradients of the whole batch, to rounding."""

    def gradients(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if method == "lora":
            tuned = with_lora(model)
        else:
            torch.manual_seed(7)
            tuned = peft.get_peft_model(
                model, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=16)
            )
        loss = loss_of(tuned.train(), rows=7)
        loss.backward()
        found = [parameter.grad for parameter in tuned.parameters() if parameter.requires_grad]
        assert found
        return loss.detach(), found

    loss, whole = gradients(local())
    for tokens in (12, 30):  # one row each; two or three
        split_loss, split = gradients(connect(micro_batch_tokens=tokens))
        assert abs(split_loss - loss) <= 1e-6
        for ours, theirs in zip(split, whole, strict=True):
            assert (ours - theirs).abs().max() <= 1e-6
