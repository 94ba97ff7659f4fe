"""The two halves of a model that are on this machine: before the blocks and behind them, for rows of any sequences."""

import inspect
from typing import Any

import torch

from client.model.crossing import leave, to_host_memory
from client.model.handle import swarm_of
from client.requests.work import Work


class Halves:
    """What a distributed model computes itself. Used from one thread."""

    def __init__(self, model: Any):
        self._model = model
        self._layer = swarm_of(model).layer
        self._takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters

    @torch.no_grad()
    def before(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What goes into the blocks, (rows, tokens, hidden size) in host memory; `ids`, `positions`: (rows, tokens)."""
        hidden = self._layer.before_blocks(lambda: self._run(ids, positions))
        return to_host_memory(Work(), hidden)[1]

    @torch.no_grad()
    def behind(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (rows, tokens, vocabulary), float32 in host memory; `hidden` (rows, tokens, hidden size) is what comes
        from the blocks.

        Rows may be of any sequences and positions: what comes behind the blocks looks at each token by itself.
        """
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
        hidden = leave(hidden, self._model.device)
        logits: torch.Tensor = self._layer.behind_blocks(hidden, lambda: self._run(ids, ids)).logits
        return logits.float().cpu()

    def _run(self, ids: torch.Tensor, positions: torch.Tensor) -> Any:
        device = self._model.device
        given = {"position_ids": positions.to(device)} if self._takes_positions else {}
        return self._model(input_ids=ids.to(device), use_cache=False, **given)
