"""Models whose keys depend on how far a call reaches: prompts go whole, and keys are made again as they were made."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from client.generation.dynamic_rope import DynamicRope
from tests.tools.families import build_small
from tests.tools.swarm import ForkServer, Swarm, new_swarm

LENGTH = 32
"""Up to which frequencies do not change."""
SIZES: dict[str, Any] = {
    "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
}  # fmt: skip


def longrope() -> PreTrainedConfig:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0], "original_max_position_embeddings": LENGTH, "factor": 8.0,
    }  # fmt: skip
    return transformers.Phi3Config(
        **SIZES, max_position_embeddings=256, original_max_position_embeddings=LENGTH, rope_parameters=rope
    )


def dynamic() -> PreTrainedConfig:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return transformers.LlamaConfig(**SIZES, max_position_embeddings=LENGTH, rope_parameters=rope)


@pytest.fixture(scope="module", params=[longrope, dynamic])
def served(
    request: pytest.FixtureRequest, fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Swarm]]:
    path = build_small(tmp_path_factory.mktemp("reach") / "model", request.param())
    with new_swarm(fork_server) as swarm:
        swarm.serve(path, "0:1", "1:3", "1:3", "1:3")
        yield path, swarm


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(3, 128, (2, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def run(model: Any, steps: list[int], between: Callable[[Any], None] = lambda cache: None) -> torch.Tensor:
    """Logits of the last of some steps on one cache; `between` happens before it."""
    cache = transformers.DynamicCache(config=model.config)
    for number, tokens in enumerate(steps):
        if number == len(steps) - 1:
            between(cache)
        logits: torch.Tensor = model(ids(tokens), past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("tokens", [LENGTH - 2, LENGTH + 20])
def test_a_prompt_goes_whole(served: tuple[Path, Swarm], tokens: int) -> None:
    path, swarm = served
    local = transformers.AutoModelForCausalLM.from_pretrained(path)
    remote = swarm.connect(path, prefill_chunk_tokens=8)
    torch.testing.assert_close(run(remote, [tokens]), run(local, [tokens]), rtol=0, atol=1e-5)


def test_honest_peers_are_not_found_to_lie(served: tuple[Path, Swarm]) -> None:
    path, swarm = served
    remote = swarm.connect(path, verify=1.0)
    run(remote, [LENGTH - 2, 5, 1, 3])
    assert not remote.swarm.health._bans


@pytest.mark.parametrize("steps", [[LENGTH - 2, 1, 1], [LENGTH - 2, 5, 1, 3], [LENGTH + 2, 1, 1]])
def test_a_lost_cache_is_made_again_as_it_was(served: tuple[Path, Swarm], steps: list[int]) -> None:
    path, swarm = served
    local = transformers.AutoModelForCausalLM.from_pretrained(path)

    def lose(cache: Any) -> None:
        for stage in cache.layers[0].session._stages:
            stage.channel.close()

    torch.testing.assert_close(run(swarm.connect(path), steps, lose), run(local, steps), rtol=0, atol=1e-5)


def test_runs() -> None:
    reaches = torch.tensor([30, 30, 31, 40, 40, 41])
    assert DynamicRope((("longrope", LENGTH),)).runs(reaches) == [3, 3]
    assert DynamicRope((("dynamic", LENGTH),)).runs(reaches) == [3, 2, 1]
    assert DynamicRope((("dynamic", LENGTH),)).runs(reaches[:1]) == [1]
    per_type = {"full_attention": longrope().rope_parameters, "sliding_attention": {"rope_type": "default"}}
    assert DynamicRope.of(transformers.LlamaConfig(rope_parameters=None)) == DynamicRope(())
    config = transformers.LlamaConfig()
    config.rope_parameters = per_type
    assert DynamicRope.of(config) == DynamicRope((("longrope", LENGTH),))
