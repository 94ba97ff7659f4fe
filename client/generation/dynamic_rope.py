"""Models whose keys depend on how far the call that made them reached.

Rotary embeddings for long contexts may take their frequencies from the largest position in a call
(`transformers.modeling_rope_utils.dynamic_rope_update`): "longrope" has one set up to a length and another one beyond,
"dynamic" a set for every length beyond. So a prompt must go in one call, and lost keys be made again by calls that
reach as far as those that had made them.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ReachDependence:
    """True where there is any. `lengths`: up to so many tokens, a call's reach makes no difference; with the type."""

    lengths: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ReachDependence":
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

    def runs(self, reaches: torch.Tensor) -> list[int]:
        """How many tokens one call after the other has to make. `reaches`: (tokens,) how far, in tokens, the calls
        reached that made them."""
        sets = [
            (reaches > length).long() if kind == "longrope" else reaches.clamp(min=length)
            for kind, length in self.lengths
        ]
        changes = torch.stack(sets).diff().any(0).nonzero().flatten() + 1
        return [end - start for start, end in itertools.pairwise([0, *changes.tolist(), len(reaches)])]


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """For all layers, or for each type of layers."""
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (rope for rope in parameters.values() if isinstance(rope, Mapping) and "rope_type" in rope)
