"""Leading factors of remote weights, which peers compute for PiSSA and OLoRA.

A whole factor is as large as the weight. So `torch.linalg.svd` and `qr` of a ghost return stand-ins: slicing off the
leading part of one tells the rank, and only then is a peer asked for that many factors.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from client.ghosts.questions import RemoteWeightError, Subtracted, Weight
from client.swarm.retries import Retries
from client.swarm.routes import Hop
from client.swarm.swarm import Swarm
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.errors import PeerFailed, SwarmError

aten = torch.ops.aten
_LEFT: dict[int, str] = {pb.SVD: "u", pb.LOW_RANK_SVD: "u", pb.QR: "q"}
_ROUNDING = 1e-4
"""The share of a product's squared norm that may lie outside of the factors that it was made of."""


class FactorTensor(torch.Tensor):
    """Stands in for a whole factor of a remote weight, float32; its leading part is fetched when it is sliced off."""

    read: Callable[[int], torch.Tensor]
    axis: int
    """The dimension along which the factors are numbered."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], axis: int, read: Callable[[int], torch.Tensor]) -> "FactorTensor":
        factor: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=torch.device("cpu"))
        factor.axis, factor.read = axis, read
        return factor  # type: ignore[no-any-return]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FactorTensor({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        factor, rest = args[0], args[1:]
        if isinstance(factor, cls):
            whole = factor.shape[factor.axis]
            if func is aten.alias.default:  # what a slice that leaves nothing out comes to
                return factor.read(whole)
            if func is aten.slice.Tensor:
                dim, start, end, step = (rest + (0, 0, whole, 1)[len(rest) :])[:4]
                if dim == factor.axis and not start and step == 1 and end is not None:
                    return factor.read(len(range(whole)[:end]))
        raise RemoteWeightError(
            f"{func} needs all factors of a weight that lives on remote peers; only the leading ones can be had, "
            "as in u[:, :rank]."
        )


@dataclass(frozen=True)
class _Known:
    """Factors of a weight that a peer has computed."""

    factorization: int
    rank: int
    tensors: Mapping[str, torch.Tensor]

    def narrowed(self, rank: int) -> "_Known":
        """The `rank` leading ones of them."""
        cut = {name: tensor[:, :rank] if name in ("u", "q") else tensor[:rank] for name, tensor in self.tensors.items()}
        return _Known(self.factorization, rank, cut)


class FactorCache:
    """Reads factors of the weights called `names` from peers.

    It keeps those of a weight until they are subtracted from it.
    """

    def __init__(self, swarm: Swarm, names: frozenset[str]):
        self._swarm, self._names = swarm, names
        self._known: dict[Weight, _Known] = {}

    def svd(self, weight: Weight, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        """See `FactorReader`."""
        rows, columns = shape
        k = min(shape)
        read = partial(self._read, weight, pb.SVD)
        return (
            FactorTensor((rows, k), 1, partial(read, "u")),
            FactorTensor((k,), 0, partial(read, "s")),
            FactorTensor((k, columns), 0, partial(read, "vh")),
        )

    def qr(self, weight: Weight, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        """See `FactorReader`."""
        rows, columns = shape
        k = min(shape)
        read = partial(self._read, weight, pb.QR)
        return FactorTensor((rows, k), 1, partial(read, "q")), FactorTensor((k, columns), 0, partial(read, "r"))

    def svd_lowrank(self, weight: Weight, shape: torch.Size, rank: int, iterations: int) -> tuple[torch.Tensor, ...]:
        """See `FactorReader`. The start is drawn on this machine: a seed then gives what it gives without a swarm."""
        is_wide = shape[0] < shape[1]
        tall = replace(weight, transposed=weight.transposed != is_wide)
        request = _request(tall, pb.LOW_RANK_SVD, rank, iterations)
        found = self._swarm.loop.run(self._ask(request, {"start": torch.randn(min(shape), rank)}, tall.subtracted))
        u, s, v = found["u"], found["s"], found["vh"].mT
        u, v = (v, u) if is_wide else (u, v)
        self._known[weight] = _Known(pb.LOW_RANK_SVD, rank, {"u": u})
        return u.clone(), s, v.clone()

    def subtract(self, weight: Weight, part: torch.Tensor) -> Subtracted:
        """See `FactorReader`."""
        known = self._known.pop(weight, None)
        if known is None:
            raise RemoteWeightError(
                f"Something was subtracted from {weight.name}, which lives on remote peers; only a product of its own "
                "leading factors can be."
            )
        left = known.tensors[_LEFT[known.factorization]]
        part = part.detach().to(left)
        right = left.mT @ part
        if not part.square().sum() - right.square().sum() <= _ROUNDING * part.square().sum():
            raise RemoteWeightError(f"What was subtracted from {weight.name} is no product of its leading factors.")
        b, a = (right.mT, left.mT) if weight.transposed else (left, right)
        if weight.subtracted is not None:
            b, a = torch.cat((weight.subtracted.b, b), 1), torch.cat((weight.subtracted.a, a))
        return Subtracted(b.contiguous(), a.contiguous())

    def _read(self, weight: Weight, factorization: int, name: str, rank: int) -> torch.Tensor:
        """The leading part of the factor called `name`."""
        known = self._known.get(weight)
        if known is None or known.factorization != factorization or known.rank < rank:
            self._swarm.loop.run(self._fetch(weight, factorization, rank))
        self._known[weight] = self._known[weight].narrowed(rank)
        return self._known[weight].tensors[name].clone()

    async def _fetch(self, weight: Weight, factorization: int, rank: int) -> None:
        """Fetch this weight's factors, and at the same time those of its like in one block of each later peer.

        PEFT asks for one weight after the other, and a decomposition takes long; this keeps all peers at work.
        """
        block = int(weight.name.partition(".")[0])
        route = await Retries(self._swarm).find_route(block, self._swarm.model_id.num_blocks, "forward")
        ahead = [self._next(weight, hop) for hop in route[1:]] if weight.subtracted is None else []
        wanted = [weight, *(later for later in ahead if later)]
        requests = [_request(each, factorization, rank) for each in wanted]
        results = await asyncio.gather(
            *(self._ask(request, {}, each.subtracted) for request, each in zip(requests, wanted, strict=True)),
            return_exceptions=True,
        )
        for each, found in zip(wanted, results, strict=True):
            if isinstance(found, BaseException):
                if each is weight or not isinstance(found, SwarmError):
                    raise found
            else:
                self._known[each] = _Known(factorization, rank, found)

    def _next(self, weight: Weight, hop: Hop) -> Weight | None:
        """The same weight in the first block of a hop for which its factors are not known yet."""
        path = weight.name.partition(".")[2]
        candidates = (replace(weight, name=f"{block}.{path}") for block in range(hop.start, hop.end))
        return next((each for each in candidates if each.name in self._names and each not in self._known), None)

    async def _ask(
        self, request: pb.Factorize, tensors: Mapping[str, torch.Tensor], subtracted: Subtracted | None
    ) -> dict[str, torch.Tensor]:
        """The factors that `request` asks for, from the first peer of its block that gives them."""
        block, retries = int(request.name.partition(".")[0]), Retries(self._swarm)
        given = {**tensors, "shift.b": subtracted.b, "shift.a": subtracted.a} if subtracted else dict(tensors)
        found = dict[str, torch.Tensor]()

        async def ask(hop: Hop) -> None:
            async with self._swarm.connections.channel(hop.peer.peer_id) as channel:
                answer = await channel.call(Message(request, given))
            found.update(_factors_in(answer, request, hop))

        await retries.hop_by_hop(await retries.find_route(block, block + 1, "forward"), "forward", ask)
        return found


def _request(weight: Weight, factorization: int, rank: int, iterations: int = 0) -> pb.Factorize:
    return pb.Factorize(
        name=weight.name,
        transposed=weight.transposed,
        factorization=factorization,  # type: ignore[arg-type]
        rank=rank,
        iterations=iterations,
    )


def _factors_in(answer: Message, request: pb.Factorize, hop: Hop) -> dict[str, torch.Tensor]:
    """The factors in an answer, by name. Raises `PeerFailed` when they are not those that were asked for."""
    names = ("q", "r") if request.factorization == pb.QR else ("u", "s", "vh")
    ranks = {name: tensor.shape[1 if name in ("u", "q") else 0 :][:1] for name, tensor in answer.tensors.items()}
    if set(ranks) != set(names) or any(tuple(rank) != (request.rank,) for rank in ranks.values()):
        raise PeerFailed(f"Peer {hop.peer.peer_id} answered with something else than {request.rank} factors.")
    return dict(answer.tensors)
