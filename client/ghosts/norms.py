"""Row norms of remote weights, fetched for all blocks at the first question (DoRA asks for one module at a time)."""

import torch
from transformers import PreTrainedModel

from client.ghosts.factors import FactorCache
from client.ghosts.questions import WeightReader
from client.requests.work import read_norms
from client.swarm.loop import LOOP
from client.swarm.retries import Retries
from client.swarm.routes import Hop
from client.swarm.swarm import Swarm
from protocol.model.anatomy import BlockList


class NormCache:
    """Answers for `GhostTensor`s: norms by itself, factors by a `FactorCache`."""

    def __init__(self, swarm: Swarm, skeleton: PreTrainedModel, where: BlockList):
        blocks = where.of(skeleton)
        self._swarm = swarm
        self._names = {name for name, parameter in blocks.named_parameters() if parameter.ndim == 2}
        self._known: dict[tuple[str, bool, tuple[int, ...], torch.dtype], torch.Tensor] = {}
        self.read = WeightReader(self.norm, FactorCache(swarm, self._names))

    def norm(self, name: str, transposed: bool, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The 2-norm over `dims` of the weight `name`, transposed first if asked, cast to `dtype`."""
        key = (name, transposed, dims, dtype)
        if key not in self._known:
            LOOP.run(self._fetch(name.partition(".")[2], transposed, dims, dtype))
        return self._known[key].clone()

    async def _fetch(self, path: str, transposed: bool, dims: tuple[int, ...], dtype: torch.dtype) -> None:
        """The norms of the weights with this path, in every block that has one."""

        async def read(hop: Hop) -> None:
            names = [f"{i}.{path}" for i in range(hop.start, hop.end) if f"{i}.{path}" in self._names]
            found = await read_norms(self._swarm.connections, hop, names, transposed, dims, dtype) if names else {}
            self._known |= {(name, transposed, dims, dtype): norm for name, norm in found.items()}

        retries = Retries(self._swarm)
        route = await retries.find_route(0, self._swarm.model_id.num_blocks, "forward")
        await retries.hop_by_hop(route, "forward", read)
