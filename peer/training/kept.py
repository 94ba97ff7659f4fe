"""What forwards leave for their backwards: a graph, or what each block was called with; within a memory budget."""

import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peer.span.span import BlockCall
from peer.span.transfer import all_to_host, to_device
from peer.training.allocated import tensors_in
from protocol.errors import BadRequest, UnknownCall


@dataclass(frozen=True)
class Kept(ABC):
    """A forward that a backward will follow."""

    leaves: Mapping[str, torch.Tensor]
    """By the names of their gradients."""
    result: torch.Tensor
    """(rows, tokens, hidden size)."""
    size: int
    """Bytes."""
    takes: int
    """Bytes that its backward takes as a whole, these included."""
    owner: str
    meets: bool
    """Whether its backward can meet others."""

    def backward(self, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        """The leaves' gradients in this process's memory, of a gradient of the result. Can be called once."""
        grad = to_device(grad, self.result.device, self.result.dtype)
        found = zip(self.leaves, self._gradients(grad), strict=True)
        return all_to_host({f"grad.{name}": gradient for name, gradient in found if gradient is not None})

    @abstractmethod
    def _gradients(self, grad: torch.Tensor) -> Sequence[torch.Tensor | None]: ...


@dataclass(frozen=True)
class Graph(Kept):
    """Autograd's own graph, with all the activations that it saved."""

    def _gradients(self, grad: torch.Tensor) -> Sequence[torch.Tensor | None]:
        return _grad(self.result, list(self.leaves.values()), grad)


@dataclass(frozen=True)
class Checkpoints(Kept):
    """What each block was called with (Chen et al. 2016): backward computes one block after the other again."""

    calls: Sequence[BlockCall]
    again: Callable[[BlockCall, torch.Tensor], torch.Tensor]
    """A block's result once more, of a leaf made of its input, and of those of `leaves` that are the block's own."""

    def _gradients(self, grad: torch.Tensor) -> Sequence[torch.Tensor | None]:
        found: dict[str, torch.Tensor | None] = {}
        names = _by_block(self.leaves)
        for call in reversed(self.calls):
            hidden, own = call.hidden.detach().requires_grad_(), names.get(call.block, [])
            with torch.enable_grad():
                result = self.again(call, hidden)
            grads = _grad(result, [hidden, *(self.leaves[name] for name in own)], grad)
            found |= zip(own, grads[1:], strict=True)
            assert grads[0] is not None, "every block's result depends on its input"
            grad = grads[0]
        found["hidden_states"] = grad
        return [found.get(name) for name in self.leaves]


def checkpoint_bytes(calls: Sequence[BlockCall], result: torch.Tensor) -> int:
    """Bytes of what blocks were called with, and of the last one's result; what several of them share counts once."""
    tensors = tensors_in([result, *((call.hidden, call.positional, call.arguments) for call in calls)])
    storages = map(torch.Tensor.untyped_storage, tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held_by_operations(result: torch.Tensor) -> Iterator[torch.Tensor]:
    """What operations of a result's graph hold without having autograd save it, as those of bitsandbytes' int8 do."""
    met, waiting = set[Any](), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in met:
            met.add(node)
            waiting += [other for other, _ in node.next_functions]
            yield from tensors_in(getattr(node, "__dict__", {}))


def _by_block(names: Iterable[str]) -> dict[int, list[str]]:
    """The leaves of adapters and prefixes, `KIND.BLOCK.REST`, by their blocks."""
    found: dict[int, list[str]] = {}
    for name in names:
        if name != "hidden_states":
            found.setdefault(int(name.split(".", 2)[1]), []).append(name)
    return found


def _grad(result: torch.Tensor, leaves: Sequence[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    try:
        with torch.autograd.set_multithreading_enabled(False):  # a GPU's part also on this thread, which meets others
            return torch.autograd.grad(result, leaves, grad, allow_unused=True)
    except BaseException:
        _empty_queue()
        raise


def _empty_queue() -> None:
    """A backward that fails leaves what it had yet to do, and its tensors, in this thread's queue for the next one."""
    leaf = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        result = leaf * 1
    torch.autograd.grad(result, leaf)


class KeptCalls:
    """Forwards whose backwards are to come, under their call IDs, within `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._kept = dict[int, Kept]()
        """Oldest first."""
        self.owners = set[str]()
        """The clients that have had something kept and are still there: they share the memory."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(kept.size for kept in list(self._kept.values()))  # the compute thread changes them

    def add(self, kept: Kept) -> int:
        """Keep it, if there can be room for it. Returns its call ID; 0: it is not kept."""
        if kept.size > self.max_bytes:
            return 0
        call_id = secrets.randbits(63) | 1
        self._kept[call_id] = kept
        self.owners.add(kept.owner)
        self._make_room()
        return call_id

    def take(self, call_id: int, owner: str, grad: torch.Tensor) -> Kept:
        """No longer keep a call, whose result's gradient is `grad`. Raises `UnknownCall`, `BadRequest`."""
        kept = self._kept.get(call_id)
        if kept is None or kept.owner != owner:
            raise UnknownCall("The activations of this call are no longer kept; send the forward's inputs again.")
        if grad.shape != kept.result.shape:
            raise BadRequest(f"grad has shape {list(grad.shape)}; the forward's result has {list(kept.result.shape)}.")
        return self._kept.pop(call_id)

    def meets(self, call_id: int) -> bool:
        """Whether the backward of a kept call can meet others."""
        kept = self._kept.get(call_id)
        return kept is not None and kept.meets

    def forget(self, owner: str) -> None:
        """Drop everything kept for a client that has gone."""
        self.owners.discard(owner)
        for call_id in [i for i, kept in self._kept.items() if kept.owner == owner]:
            del self._kept[call_id]

    def drop_oldest(self, size: float) -> None:
        """Drop the oldest, until so many bytes are free of them or nothing is kept."""
        while self._kept and size > 0:
            size -= self._kept.pop(next(iter(self._kept))).size

    def _make_room(self) -> None:
        """The client that keeps most loses its oldest."""
        while True:
            sizes = Counter[str]()
            for kept in self._kept.values():
                sizes[kept.owner] += kept.size
            if sizes.total() <= self.max_bytes:
                return
            greediest = sizes.most_common(1)[0][0]
            del self._kept[next(i for i, kept in self._kept.items() if kept.owner == greediest)]
