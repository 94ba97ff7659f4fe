"""A ghost: a tensor with the shape and dtype of a weight on remote peers, and without its values.

PEFT, Trainer and `generate` see an ordinary weight. Arithmetic on a ghost raises `RemoteWeightError`, except for what
PEFT does when it makes an adapter: DoRA needs a weight's row norms; PiSSA and OLoRA take its leading factors and
subtract their product. Peers compute norms and factors. What was subtracted is kept with the ghost; the weight on the
peers stays as it is. Copies of a model may be averaged (`torch.optim.swa_utils`): that leaves ghosts what they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import nn

from client.ghosts.questions import FactorReader, RemoteWeightError, Subtracted, Weight, WeightReader

aten = torch.ops.aten
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Source:
    """Where a ghost's values are."""

    name: str
    """`BLOCK.PATH.weight`, or another parameter's name."""
    reader: WeightReader


class GhostTensor(torch.Tensor):
    """A weight on remote peers. Its device is the CPU; `source` is `None` for what nothing may be asked about."""

    source: Source | None
    transposed: bool
    subtracted: Subtracted | None
    ds_optim_param = True
    """DeepSpeed's own mark for weights that it must not send from the first process to the others."""

    @staticmethod
    def __new__(
        cls, like: torch.Tensor, source: Source | None, transposed: bool = False, dtype: torch.dtype | None = None
    ) -> "GhostTensor":
        flipped = transposed != getattr(like, "transposed", False)
        shape = like.shape[::-1] if flipped else like.shape
        ghost: Any = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype or like.dtype, device=torch.device("cpu")
        )
        ghost.source, ghost.transposed, ghost.subtracted = source, transposed, getattr(like, "subtracted", None)
        return ghost  # type: ignore[no-any-return]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GhostTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "GhostTensor":
        twin = GhostTensor(self, self.source, self.transposed)
        return nn.Parameter(twin, self.requires_grad) if isinstance(self, nn.Parameter) else twin  # type: ignore[return-value]

    def element_size(self) -> int:
        """Bytes that an element takes on this machine (`get_memory_footprint` asks)."""
        return 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.svd_lowrank and _is_factorable(args[0]) and kwargs.get("M") is None:
            return _svd_lowrank(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func == _SET_DATA and isinstance(args[0], cls) and isinstance(args[1], cls):
            args[0].subtracted = args[1].subtracted  # torch copies the tensor, not its Python attributes
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        ghost, rest = args[0], args[1:]
        if _is_averaging(func, *args[:2]):
            return _average(func, *args, **(kwargs or {}))
        if isinstance(ghost, cls):
            if func in (aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default):
                return cls(ghost, ghost.source, ghost.transposed, (kwargs or {}).get("dtype"))
            if func in (aten.t.default, aten.transpose.int, aten.permute.default) and ghost.ndim == 2:
                return cls(ghost, ghost.source, not ghost.transposed)
            if func in _FOR_DORA and ghost.subtracted is None:
                return _FOR_DORA[func](ghost, func, *rest)
            if func in _FOR_FACTORS and _is_factorable(ghost) and not kwargs:
                return _FOR_FACTORS[func](ghost, func, *rest)
        raise _refusal(func, ghost)


def _add(ghost: GhostTensor, func: Any, other: Any) -> torch.Tensor:
    if isinstance(other, GhostTensor):
        raise _refusal(func, ghost)
    other = torch.as_tensor(other)
    if other.is_meta:  # an adapter that is about to be loaded: PEFT's low_cpu_mem_usage
        return torch.empty_like(other, dtype=torch.promote_types(ghost.dtype, other.dtype))
    if other.any():
        raise _refusal(func, ghost)
    return GhostTensor(ghost, ghost.source, ghost.transposed, torch.promote_types(ghost.dtype, other.dtype))


def _norm(ghost: GhostTensor, func: Any, order: float = 2, dims: Any = (), *rest: Any) -> torch.Tensor:
    if not ghost.source or order != 2:
        raise _refusal(func, ghost)
    return ghost.source.reader.norm(ghost.source.name, ghost.transposed, tuple(dims), ghost.dtype)


def _svd(ghost: GhostTensor, func: Any, full_matrices: bool = False, compute_uv: bool = True) -> Any:
    if full_matrices or not compute_uv:
        raise _refusal(func, ghost)
    return _factors(ghost).svd(_weight(ghost), ghost.shape)


def _qr(ghost: GhostTensor, func: Any, mode: str = "reduced") -> Any:
    if mode != "reduced":
        raise _refusal(func, ghost)
    return _factors(ghost).qr(_weight(ghost), ghost.shape)


def _svd_lowrank(ghost: GhostTensor, q: int = 6, niter: int = 2, M: None = None) -> Any:
    return _factors(ghost).svd_lowrank(_weight(ghost), ghost.shape, q, niter)


def _sub(ghost: GhostTensor, func: Any, other: Any) -> GhostTensor:
    return _sub_in_place(GhostTensor(ghost, ghost.source, ghost.transposed), func, other)


def _sub_in_place(ghost: GhostTensor, func: Any, other: Any) -> GhostTensor:
    if isinstance(other, GhostTensor) or torch.as_tensor(other).shape != ghost.shape:
        raise _refusal(func, ghost)
    ghost.subtracted = _factors(ghost).subtract(_weight(ghost), other)
    return ghost


class _Share(torch.Tensor):
    """A multiple of a ghost, on its way into an average; it can only be added to others, and copied into the ghost."""

    ghost: GhostTensor
    factor: float

    @staticmethod
    def __new__(cls, ghost: GhostTensor, factor: float) -> "_Share":
        share: Any = torch.Tensor._make_wrapper_subclass(cls, ghost.shape, dtype=ghost.dtype, device=ghost.device)
        share.ghost, share.factor = ghost, factor
        return share  # type: ignore[no-any-return]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.factor} * {self.ghost}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if not _is_averaging(func, *args):
            raise _refusal(func, args[0])
        return _average(func, *args, **(kwargs or {}))


_LISTS = {aten._foreach_copy_.default, aten._foreach_lerp_.Scalar}
_MULTIPLES = {aten.mul.Tensor, aten.div.Tensor}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_RESULTS = {aten.copy_.default, aten.lerp_.Scalar}


def _is_averaging(func: Any, first: Any, second: Any = None, *_: Any) -> bool:
    if func in _MULTIPLES:
        return isinstance(second, int | float) or (type(second) is torch.Tensor and second.ndim == 0)
    return func in _LISTS or (func in _SUMS | _RESULTS and isinstance(second, GhostTensor | _Share))


def _average(func: Any, first: Any, second: Any, *rest: Any, alpha: float = 1.0) -> Any:
    """A step of averaging the weights of copies of one model: ghosts of a weight with each other are that ghost."""
    if func in _LISTS:
        return _average_lists(func, first, second, *rest)
    one, other = _share(first), _share(second)
    if one is not None and func in _MULTIPLES:
        return _Share(one.ghost, one.factor * float(second) if func is aten.mul.Tensor else one.factor / float(second))
    if one is None or other is None or not _is_same(one.ghost, other.ghost):
        raise _refusal(func, first)
    if func in _SUMS:
        return _Share(one.ghost, one.factor + (alpha if func is aten.add.Tensor else -alpha) * other.factor)
    if not isinstance(first, GhostTensor) or abs(other.factor - 1) > 1e-6:
        raise _refusal(func, first)
    return first


def _average_lists(func: Any, first: Any, second: Any, *rest: Any) -> None:
    """On the pairs of tensors that are on this machine; pairs of ghosts must be of one weight."""
    pairs = list(zip(first, second, strict=True))
    is_own = [not any(isinstance(each, GhostTensor) for each in pair) for pair in pairs]
    for pair, own in zip(pairs, is_own, strict=True):
        if not own and not (all(isinstance(each, GhostTensor) for each in pair) and _is_same(*pair)):
            raise _refusal(func, first)
    if any(is_own):
        func(list(compress(first, is_own)), list(compress(second, is_own)), *rest)


def _share(tensor: Any) -> _Share | None:
    return _Share(tensor, 1.0) if isinstance(tensor, GhostTensor) else tensor if isinstance(tensor, _Share) else None


def _is_same(one: GhostTensor, other: GhostTensor) -> bool:
    is_alike = one.shape == other.shape and one.transposed == other.transposed
    return is_alike and one.source == other.source and one.subtracted is other.subtracted


_FOR_DORA: dict[Any, Callable[..., Any]] = {aten.add.Tensor: _add, aten.linalg_vector_norm.default: _norm}
_FOR_FACTORS: dict[Any, Callable[..., Any]] = {
    aten._linalg_svd.default: _svd,
    aten.linalg_qr.default: _qr,
    aten.sub.Tensor: _sub,
    aten.sub_.Tensor: _sub_in_place,
}


def _is_factorable(tensor: Any) -> bool:
    is_matrix = isinstance(tensor, GhostTensor) and tensor.source is not None and tensor.ndim == 2
    return is_matrix and tensor.dtype == torch.float32


def _factors(ghost: GhostTensor) -> FactorReader:
    assert ghost.source
    return ghost.source.reader.factors


def _weight(ghost: GhostTensor) -> Weight:
    assert ghost.source
    return Weight(ghost.source.name, ghost.transposed, ghost.subtracted)


def _refusal(func: Any, ghost: Any) -> RemoteWeightError:
    if func in _FOR_DORA and getattr(ghost, "subtracted", None) is not None:
        return RemoteWeightError(
            f"{func} needs a weight that PiSSA or OLoRA has changed and that lives on remote peers; neither DoRA nor "
            "merging works together with them on this machine."
        )
    advice = ""
    if func == aten.add.Tensor:
        advice = "; begin DoRA with init_lora_weights=True, or load it by PeftModel and low_cpu_mem_usage=True"
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        advice = "; to train in several processes use DistributedDataParallel, as torchrun and accelerate do by default"
    return RemoteWeightError(
        f"{func} needs a weight of the transformer blocks, and this weight lives on remote peers; "
        f"only adapters and what lies outside of the blocks can be computed with on this machine{advice}."
    )
