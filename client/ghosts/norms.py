"""Row norms of remote weights, which peers compute.

DoRA asks for the norms of one module at a time; the first question about a module fetches them for every block.
"""

import torch

from client.swarm.retries import Retries
from client.swarm.routes import Hop
from client.swarm.swarm import Swarm
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.connections import Connections
from protocol.tensors import wire_dtype


class NormCache:
    """Reads norms of the weights called `names` from peers, and keeps them."""

    def __init__(self, swarm: Swarm, names: frozenset[str]):
        self._swarm, self._names = swarm, names
        self._known: dict[tuple[str, bool, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def norm(self, name: str, transposed: bool, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The 2-norm over `dims` of the weight `name`, transposed first if asked, cast to `dtype`.

        Raises `SwarmError` when no peer gives it.
        """
        key = (name, transposed, dims, dtype)
        if key not in self._known:
            self._swarm.loop.run(self._fetch(name.partition(".")[2], transposed, dims, dtype))
        return self._known[key].clone()

    async def _fetch(self, path: str, transposed: bool, dims: tuple[int, ...], dtype: torch.dtype) -> None:
        """Fetch the norms of the weights with this path, in every block that has one."""

        async def read(hop: Hop) -> None:
            names = [f"{i}.{path}" for i in range(hop.start, hop.end) if f"{i}.{path}" in self._names]
            found = await _read_norms(self._swarm.connections, hop, names, transposed, dims, dtype) if names else {}
            self._known |= {(name, transposed, dims, dtype): norm for name, norm in found.items()}

        retries = Retries(self._swarm)
        route = await retries.find_route(0, self._swarm.model_id.num_blocks, "forward")
        await retries.hop_by_hop(route, "forward", read)


async def _read_norms(
    connections: Connections, hop: Hop, names: list[str], transposed: bool, dims: tuple[int, ...], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The norms of base weights that a hop's peer holds."""
    request = pb.ReadWeight(names=names, transposed=transposed, norm_dims=dims, dtype=wire_dtype(dtype))
    async with connections.channel(hop.peer.peer_id) as channel:
        answer = await channel.call(Message(request))
    return {name: answer.tensor(f"value.{i}") for i, name in enumerate(names)}
