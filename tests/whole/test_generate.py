"""`generate` through a swarm yields the tokens of plain local Transformers, whatever the decoding method."""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
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
from transformers import DynamicCache, TextIteratorStreamer

from protocol.errors import BadUsage
from tests.tools import arena
from tests.tools.swarm import Swarm

VOCABULARY = 128
NEW = 20


@dataclass(frozen=True)
class Pair:
    """The same model, plain and through a swarm."""

    local: Any
    remote: Any

    def both(self, run: Callable[[Any], Any], grad: bool = False) -> tuple[Any, Any]:
        """What `run` returns for the plain model, and for the swarm's."""
        results = []
        for model in (self.local, self.remote):
            torch.manual_seed(9)
            with torch.set_grad_enabled(grad):
                results.append(run(model))
        return results[0], results[1]


def connect(path: Path, swarm: Swarm) -> Pair:
    local = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    local.requires_grad_(False)  # as the swarm's: torch multiplies by a trainable matrix in another way
    return Pair(local, swarm.connect(path))


@pytest.fixture(scope="module")
def llama(llama_swarm: tuple[Path, Swarm]) -> Pair:
    return connect(*llama_swarm)


batch, one = partial(arena.batch, NEW), partial(arena.one, NEW)


def assistant() -> Any:
    """A small local model of the same vocabulary; it guesses wrong most of the time."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes, **tokens)).eval()


METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": batch,
    "no_cache": lambda: batch() | {"use_cache": False},
    "sampling": lambda: batch() | {"do_sample": True, "top_p": 0.9, "top_k": 20},
    "beams": lambda: batch() | {"num_beams": 4},
    "beams_returned": lambda: batch() | {"num_beams": 4, "num_return_sequences": 3},
    "beam_sampling": lambda: batch() | {"num_beams": 3, "do_sample": True},
    "returned": lambda: one() | {"do_sample": True, "num_return_sequences": 3},
    "prompt_lookup": lambda: one() | {"prompt_lookup_num_tokens": 4},
    "assisted": lambda: one() | {"assistant_model": assistant()},
    "chunked_prefill": lambda: batch() | {"prefill_chunk_size": 5},
    "repetition_penalty": lambda: batch() | {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("method", METHODS)
def test_same_tokens(method: str, llama: Pair) -> None:
    options = METHODS[method]()
    theirs, ours = llama.both(lambda model: model.generate(**options))
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == options["input_ids"].shape[1] + NEW


def test_an_assistant_that_knows_the_model(llama: Pair) -> None:
    """All guesses but those on sampled tokens are accepted; the assistant is the plain model itself."""
    options = one() | {"assistant_model": llama.local}
    theirs, ours = llama.both(lambda model: model.generate(**options))
    assert torch.equal(ours, theirs)
    theirs, ours = llama.both(lambda model: model.generate(**options | {"do_sample": True}))
    assert torch.equal(ours, theirs)


def test_beams_that_end(llama: Pair) -> None:
    """Beams end early, each at another step, and are left behind."""
    ends = llama.local.generate(**batch(), num_beams=4)[:, 14].tolist()
    options = batch() | {"eos_token_id": ends, "num_beams": 4, "num_return_sequences": 2}
    theirs, ours = llama.both(lambda model: model.generate(**options))
    assert torch.equal(ours, theirs)
    lengths = [min(row.index(end) for end in ends if end in row) for row in ours[:, 14:].tolist()]
    assert ours.shape[1] < 14 + NEW
    assert len(set(lengths)) > 2


def test_scores(llama: Pair) -> None:
    options = batch() | {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    theirs, ours = llama.both(lambda model: model.generate(**options))
    assert torch.equal(torch.stack(ours.scores), torch.stack(theirs.scores))
    assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))
    theirs, ours = llama.both(lambda model: model.generate(**options, num_beams=3))
    assert torch.equal(ours.sequences_scores, theirs.sequences_scores)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words)


class _Tokens:
    """A streamer that notes what it gets, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_one_token_at_a_time(llama: Pair) -> None:
    def run(model: Any) -> list[list[int]]:
        streamer = _Tokens()
        model.generate(**one(), streamer=streamer)
        assert streamer.ended
        return streamer.pieces

    theirs, ours = llama.both(run)
    assert ours == theirs
    assert [len(piece) for piece in ours] == [11, *[1] * NEW]


def test_text_streamed_to_another_thread(llama: Pair) -> None:
    tokenizer = _tokenizer()

    def run(model: Any) -> str:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=model.generate, kwargs=one() | {"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    theirs, ours = llama.both(run)
    assert ours == theirs
    assert len(ours.split()) == NEW


def test_a_conversation_on_one_cache_and_its_fork(llama: Pair) -> None:
    """Three turns on a cache that the user holds; a deep copy of it goes another way, without touching the first."""

    def turn(model: Any, cache: DynamicCache, ids: torch.Tensor) -> torch.Tensor:
        options = one() | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5}
        return model.generate(**options, past_key_values=cache)

    def talk(model: Any) -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        said = [turn(model, cache, one()["input_ids"])]
        fork = copy.deepcopy(cache)
        for which, word in ((cache, 11), (fork, 12), (cache, 13), (fork, 14)):
            before = said[0] if word in (11, 12) else said[-2]
            said.append(turn(model, which, torch.cat([before, torch.tensor([[word, 13]])], 1)))
        assert cache.get_seq_length() == fork.get_seq_length()
        return said

    theirs, ours = llama.both(talk)
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours[3], ours[4])


def test_a_cache_cropped_by_the_user(llama: Pair) -> None:
    """A prompt's cache is used again for several continuations."""

    def run(model: Any) -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        prompt = one()["input_ids"]
        model(input_ids=prompt, past_key_values=cache)
        logits = []
        for word in (20, 30, 40):
            logits.append(model(input_ids=torch.tensor([[word, word + 1]]), past_key_values=cache).logits)
            cache.crop(-2)
        assert cache.get_seq_length() == prompt.shape[1]
        return logits

    theirs, ours = llama.both(run)
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("cached", [True, False])
def test_positions_that_begin_anew(llama: Pair, cached: bool) -> None:
    """They are rows packed into one, unless there is a cache, or a mask, and be it of ones."""
    ids, positions = one()["input_ids"][:, :6], torch.arange(6)[None] % 3

    def run(model: Any) -> list[torch.Tensor]:
        masks = None, torch.ones_like(ids)
        return [model(ids, attention_mask=m, position_ids=positions, use_cache=cached).logits for m in masks]

    theirs, ours = llama.both(run)
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(*ours) == cached


def test_a_cache_that_is_reset_is_empty(llama: Pair) -> None:
    def run(model: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        model(input_ids=one()["input_ids"], past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        return model(input_ids=batch()["input_ids"], past_key_values=cache).logits  # also another number of rows

    theirs, ours = llama.both(run)
    assert torch.equal(ours, theirs)


def test_a_cache_cropped_beyond_its_beginning_is_empty(llama: Pair) -> None:
    cache = llama.remote(input_ids=one()["input_ids"]).past_key_values
    cache.crop(-20)
    assert cache.get_seq_length() == 0
    again, ids = llama.remote(input_ids=batch()["input_ids"], past_key_values=cache), torch.full((3, 1), 5)
    with torch.no_grad():
        expected = llama.local(input_ids=torch.cat([batch()["input_ids"], ids], 1)).logits[:, -1:]
        torch.testing.assert_close(llama.remote(input_ids=ids, past_key_values=again.past_key_values).logits, expected)


@pytest.mark.parametrize("rows", [torch.tensor([True, False, True]), torch.tensor([-1, 0]), [2, 1], slice(1, None)])
def test_rows_of_a_cache_chosen_in_any_way(rows: Any, llama: Pair) -> None:
    def run(model: Any) -> torch.Tensor:
        cache = model(input_ids=batch()["input_ids"]).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, -1]))
        cache.batch_select_indices(rows)
        return model(input_ids=torch.full((2, 1), 5), past_key_values=cache).logits

    theirs, ours = llama.both(run)
    assert torch.equal(ours, theirs)


def with_lora(model: Any) -> Any:
    torch.manual_seed(7)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


def test_decoding_by_hand_with_an_adapter_and_gradients_on(llama_swarm: tuple[Path, Swarm]) -> None:
    """Nobody said no_grad: the prefill looks like a training forward, and the cache is used all the same."""
    pair = connect(*llama_swarm)

    def run(model: Any) -> torch.Tensor:
        tuned, ids, cache, logits = with_lora(model), one()["input_ids"], None, []
        for _ in range(6):
            out = tuned(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            logits.append(out.logits[:, -1].detach())
        return torch.stack(logits)

    theirs, ours = pair.both(run, grad=True)
    assert torch.equal(ours, theirs)


def with_prefix(model: Any) -> Any:
    return peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()


def with_trained_embeddings(model: Any) -> Any:
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("trained", "grad_on_prompt"),
    [(with_lora, True), (with_lora, False), (with_trained_embeddings, False), (with_prefix, True)],
)
def test_no_backward_leaves_the_cache_out(
    trained: Callable[[Any], Any], grad_on_prompt: bool, llama_swarm: tuple[Path, Swarm]
) -> None:
    """Decoding goes on with gradients on; whoever then asks for them learns that they would be wrong."""
    model, ids = trained(connect(*llama_swarm).remote), one()["input_ids"]
    with torch.set_grad_enabled(grad_on_prompt):
        prompt = model(input_ids=ids, use_cache=True)
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model  # PEFT would put the prefix anew
    for cache in copy.deepcopy(prompt.past_key_values), prompt.past_key_values:
        out = plain(input_ids=ids[:, :1], past_key_values=cache)
        with pytest.raises(BadUsage, match=r"through an earlier call's cache is not possible; pass use_cache=False\.$"):
            out.logits.log_softmax(-1).max().backward()


def test_generating_with_an_adapter(llama_swarm: tuple[Path, Swarm]) -> None:
    pair = connect(*llama_swarm)
    plain = pair.local.generate(**batch())

    def run(model: Any) -> list[torch.Tensor]:
        tuned = with_lora(model)
        return [tuned.generate(**batch(), **options) for options in ({}, {"num_beams": 3})]

    theirs, ours = pair.both(run)
    assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(ours[0], plain)


@pytest.mark.parametrize("family", ["bloom", "gemma2", "mistral", "gpt2"])
def test_families(family: str, models: Callable[[str], Path], swarm: Swarm) -> None:
    """Greedy, beam search and assisted generation, beyond the sliding windows (8) of gemma2 and mistral."""
    path = models(family)
    swarm.serve(path, "0:2", "2:5")
    pair = connect(path, swarm)
    for method in ("greedy", "beams_returned", "assisted", "prompt_lookup"):
        options = METHODS[method]()
        theirs, ours = pair.both(lambda model, options=options: model.generate(**options))
        assert torch.equal(ours, theirs), method
