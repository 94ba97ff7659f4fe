"""Checking peers: a random share of their answers is computed again by others, and those who lie are kept away from.

A peer cannot know which of its answers will be checked, so one that lies in n answers is found with probability
1 - (1 - share)^n. Two honest peers differ by rounding and quantization, so answers are compared within a tolerance that
fits both, if possible with peers that hold the weights in the same form. When two disagree a third decides; where there
is none, neither is trusted.
"""

import logging
import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from client.requests.work import Work
from client.swarm.routes import Hop
from client.swarm.swarm import Swarm
from protocol import swarm_pb2 as pb
from protocol.codecs import round_trip
from protocol.errors import NoRoute, PeerFailed, SwarmError
from protocol.records import PeerRecord

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]
_Opinion = tuple[Tensors, list[Hop]]
Recompute = Callable[[Collection[str]], Awaitable[_Opinion]]
"""Computes an answer again without certain peers; returns it and the hops that it took. Raises `SwarmError`."""

_OF_DTYPE = {"float32": 0.01, "float64": 0.01, "bfloat16": 0.1, "float16": 0.1}
"""The relative difference that rounding may make (see docs/security.md for what was measured)."""
_INT8 = 0.1
"""LLM.int8 rounds activations too, each device in its own way."""
_ACROSS = {"none": 0.0, "int8": 0.5, "nf4": 0.9}
"""The relative difference that quantization may make against other weights. A zero or an opposite answer has 1 or 2."""
_SMALL = 0.1
"""A tensor smaller than this part of the usual one is compared with that part: it is mostly rounding."""
_CODED = 1.5
"""What a codec may take from an answer, over what it takes from one that rounding or quantization makes differ."""
_ATTEMPTS = 3
_BAN = 3600.0


class Distrusted(PeerFailed):
    """A peer's answer was computed again by others and is wrong."""

    retry_after = _BAN


class Undecided(PeerFailed):
    """Two peers' answers differ, and there is no third."""

    retry_after = 60.0


@dataclass(frozen=True)
class Answer:
    """What a peer answered for a hop."""

    hop: Hop
    kind: str
    """forward, backward or step."""
    tensors: Tensors
    base: Tensors
    """What the blocks add to, by the same names; answers are compared without it, for it is most of them."""
    codec: int = pb.RAW
    """In which the hidden states, or their gradient, travelled; those that are computed again travel RAW."""


class Verifier:
    """Has a random share of the answers computed again. `share` is the probability of each."""

    def __init__(self, swarm: Swarm, share: float):
        self._swarm, self.share = swarm, share
        self._random = random.SystemRandom()
        self._told = set[str]()

    def is_due(self, work: Work) -> bool:
        """Whether to check the next answer."""
        if not self.share or self._random.random() >= self.share:
            return False
        if work.dropout_seed is not None:
            self._tell_once(
                "calls with dropout inside of the blocks cannot be verified: each device draws its own masks"
            )
            return False
        return True

    async def check(self, answer: Answer, recompute: Recompute) -> None:
        """Compare `answer` with others' results. Raises `Distrusted` when it is wrong, or when nobody can tell."""
        first = answer.hop.peer
        second = await self._opinion(answer, {first.peer_id}, recompute)
        if second is None:
            self._tell_once(f"peer {_name(first)} cannot be verified: no other that can be reached serves its blocks")
            return
        if self._agree(answer, second):
            return
        others = [hop.peer for hop in second[1]]
        third = await self._opinion(answer, {first.peer_id, *(peer.peer_id for peer in others)}, recompute)
        if third is None:
            names = " and ".join(map(_name, [first, *others]))
            error = Undecided(f"Peers {names} disagree on a {answer.kind}, and there is no other to tell who is right.")
            for peer in others:
                self._swarm.blame(peer, error)
            raise error
        liars = others if self._agree(answer, third) else [first]
        for peer in liars:
            self._condemn(peer, answer.kind)
        if first in liars:
            raise self._verdict(first, answer.kind)

    async def _opinion(self, answer: Answer, without: set[str], recompute: Recompute) -> _Opinion | None:
        """The answer of others than the peers `without`, best of such that hold the weights in the same form."""
        others = {p.peer_id for p in await self._swarm.fetch_peers() if _form(p) != _form(answer.hop.peer)}
        for excluded in (without | others, without):
            for _ in range(_ATTEMPTS):
                try:
                    return await recompute(excluded)
                except NoRoute:
                    break
                except SwarmError as error:
                    logger.debug("an answer could not be computed again: %s", error)
        return None

    def _agree(self, answer: Answer, opinion: _Opinion) -> bool:
        tensors, hops = opinion
        tolerance = _tolerance([answer.hop.peer, *(hop.peer for hop in hops)])
        return agree(answer.tensors, tensors, answer.base, tolerance, answer.codec)

    def _condemn(self, peer: PeerRecord, kind: str) -> None:
        error = self._verdict(peer, kind)
        logger.warning("%s It is kept away from for %d minutes.", error, _BAN / 60)
        self._swarm.blame(peer, error)
        self._swarm.complain(peer, kind)

    @staticmethod
    def _verdict(peer: PeerRecord, kind: str) -> Distrusted:
        return Distrusted(f"Peer {_name(peer)} answered a {kind} wrongly, as two others found.")

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("verify: %s.", message)


def agree(ours: Tensors, theirs: Tensors, base: Tensors, tolerance: float, codec: int = pb.RAW) -> bool:
    """Whether two answers, without `base`, differ by no more than `tolerance`, relative.

    Hidden states (batch, tokens, size) and their gradients are compared token by token, for a few tokens are often a
    thousand times as large as the others; the other tensors as wholes. The mean difference counts, or a tenth of the
    largest. Where ours came under a codec, what it takes from their hidden states is allowed to ours on top.
    """
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        return False
    wholes = []
    for name, mine in ours.items():
        start = base[name].float() if name in base else torch.zeros(())
        mine, other = mine.float() - start, theirs[name].float() - start
        if name == "hidden_states":
            lost = (round_trip(theirs[name], codec).float() - theirs[name].float()).norm(dim=-1)
            difference = ((mine - other).norm(dim=-1) - _CODED * lost).clamp(min=0)
            if not _difference(difference, other.norm(dim=-1)) <= tolerance:  # also when no number
                return False
        else:
            wholes.append(((mine - other).norm(), other.norm()))
    if not wholes:
        return True
    differences, sizes = map(torch.stack, zip(*wholes, strict=True))
    return _difference(differences, sizes) <= tolerance


def _difference(differences: torch.Tensor, sizes: torch.Tensor) -> float:
    scale = torch.maximum(sizes, _SMALL * sizes.median()).clamp(min=torch.finfo(torch.float32).tiny)
    relative = differences / scale
    return max(float(relative.mean()), float(relative.max()) / 10)


def _tolerance(peers: list[PeerRecord]) -> float:
    rounding = max(_OF_DTYPE.get(peer.dtype, 0.1) for peer in peers)
    quantizations = {peer.quantization for peer in peers}
    if len(quantizations) == 1:
        return max(rounding, _INT8 if "int8" in quantizations else 0.0)
    return max(rounding, *(_ACROSS.get(quantization, 0.9) for quantization in quantizations))


def _form(peer: PeerRecord) -> tuple[str, str]:
    return peer.dtype, peer.quantization


def _name(peer: PeerRecord) -> str:
    return f"{peer.name} ({peer.peer_id})" if peer.name else peer.peer_id
