"""Models whose keys depend on how far the trunk pass reached that made them.

Rotary embeddings for long contexts may take their frequencies from the largest position in a pass
(`transformers.modeling_rope_utils.dynamic_rope_update`): "longrope" has one set up to a length and another one beyond,
"dynamic" a set for every length beyond. So a prompt must go in one pass, and lost keys must be made again by passes
that reach as far as those that had made them.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class DynamicRope:
    """What a trunk has of this; False where it has nothing."""

    lengths: tuple[tuple[str, int], ...]
    """Type of the embedding, and how many tokens a pass may reach without making a difference."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "DynamicRope":
        """A trunk's."""
        found = set[tuple[str, int]]()
        for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
            if rope["rope_type"] == "longrope":
                found.add(("longrope", rope["original_max_position_embeddings"]))
            elif "dynamic" in rope["rope_type"]:
                found.add(("dynamic", config.max_position_embeddings))
        return cls(tuple(sorted(found)))

    def __bool__(self) -> bool:
        return bool(self.lengths)

    def runs(self, ends: torch.Tensor) -> list[int]:
        """Into passes of how many tokens each a sequence is to be cut, so that its keys come out as they were.

        `ends`: (tokens,), for each token how far, in tokens, the pass reached that made its key.
        """
        sets = [
            (ends > length).long() if kind == "longrope" else ends.clamp(min=length) for kind, length in self.lengths
        ]
        changes = torch.stack(sets).diff().any(0).nonzero().flatten() + 1
        return [end - start for start, end in itertools.pairwise([0, *changes.tolist(), len(ends)])]


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """For all layers, or for each type of layers."""
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (rope for rope in parameters.values() if isinstance(rope, Mapping) and "rope_type" in rope)
