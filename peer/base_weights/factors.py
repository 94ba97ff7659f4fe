"""The leading factors of a base weight, which PiSSA and OLoRA begin with. The weight itself is never changed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from peer.base_weights.norms import find_matrix
from peer.span.span import Span
from peer.span.transfer import all_to_host, to_device
from protocol import swarm_pb2 as pb
from protocol.adapters import MAX_RANK
from protocol.errors import BadRequest

MAX_FACTORS = 256
MAX_ITERATIONS = 64

Factors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """A request for factors that has been checked. Shapes as in the message `Factorize`."""

    module: nn.Module
    request: pb.Factorize
    tensors: Mapping[str, torch.Tensor]


def check_factorize(span: Span, request: pb.Factorize, tensors: Mapping[str, torch.Tensor]) -> Job:
    """A job for `factorize`. Raises `BadRequest` for a wrong name, kind, rank or tensor."""
    module = find_matrix(span, request.name)
    if request.factorization not in _FACTORIZATIONS:
        raise BadRequest(f"{request.factorization} is no known factorization; expected SVD, LOW_RANK_SVD or QR.")
    rows, columns = _shape(module)
    most = min(MAX_FACTORS, rows, columns)
    if not 1 <= request.rank <= most:
        raise BadRequest(
            f"{request.rank} factors of {request.name!r} were asked for; a peer gives between 1 and {most}: "
            "use a smaller rank."
        )
    is_low_rank = request.factorization == pb.LOW_RANK_SVD
    if request.iterations > (MAX_ITERATIONS if is_low_rank else 0):
        raise BadRequest(f"{request.iterations} iterations are too many; at most {MAX_ITERATIONS}, of LOW_RANK_SVD.")
    _check_tensors(tensors, (rows, columns), request)
    return Job(module, request, tensors)


@torch.no_grad()
def factorize(job: Job) -> Factors:
    """The factors, in float32. Takes from milliseconds to minutes, so it belongs on the compute thread.

    Raises `BadRequest` when there are none (a shift that is not finite).
    """
    torch.get_num_threads()  # LAPACK heeds the number only on threads that have asked, and this may be the first work
    from peer.base_weights.dequantized import dequantized_weight

    weight = dequantized_weight(job.module).to(torch.float32)
    given = {name: to_device(tensor, weight.device, torch.float32) for name, tensor in job.tensors.items()}
    if "shift.b" in given:
        weight = weight - given["shift.b"] @ given["shift.a"]
    if job.request.transposed:
        weight = weight.T
    try:
        factors = _FACTORIZATIONS[job.request.factorization](weight, job.request, given)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise BadRequest(f"{job.request.name!r} cannot be factorized: {error}") from error
    return all_to_host({name: factor.contiguous() for name, factor in factors.items()})


# The whole weight is decomposed, and the leading part of the result given. Shorter ways would choose other signs than
# PEFT does with weights of its own, or round differently.


def _svd(weight: torch.Tensor, request: pb.Factorize, _given: Factors) -> Factors:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return {"u": u[:, : request.rank], "s": s[: request.rank], "vh": vh[: request.rank]}


def _qr(weight: torch.Tensor, request: pb.Factorize, _given: Factors) -> Factors:
    q, r = torch.linalg.qr(weight)
    return {"q": q[:, : request.rank], "r": r[: request.rank]}


def _low_rank_svd(weight: torch.Tensor, request: pb.Factorize, given: Factors) -> Factors:
    """`torch.svd_lowrank` of a tall matrix, with the client's random start."""
    basis = torch.linalg.qr(weight @ given["start"]).Q
    for _ in range(request.iterations):
        basis = torch.linalg.qr(weight.mT @ basis).Q
        basis = torch.linalg.qr(weight @ basis).Q
    u, s, vh = torch.linalg.svd(basis.mT @ weight, full_matrices=False)
    return {"u": basis @ u, "s": s, "vh": vh}


_FACTORIZATIONS: dict[int, Callable[[torch.Tensor, pb.Factorize, Factors], Factors]] = {
    pb.SVD: _svd,
    pb.LOW_RANK_SVD: _low_rank_svd,
    pb.QR: _qr,
}


def _shape(module: nn.Module) -> tuple[int, int]:
    """Rows and columns. A quantized weight is packed: its own shape says nothing."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return rows, columns


def _check_tensors(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], request: pb.Factorize) -> None:
    rows, columns = shape
    expected: dict[str, tuple[int, ...]] = {}
    if request.factorization == pb.LOW_RANK_SVD:
        expected["start"] = (rows if request.transposed else columns, request.rank)
    if "shift.b" in tensors or "shift.a" in tensors:
        rank = tensors["shift.b"].shape[-1] if "shift.b" in tensors and tensors["shift.b"].ndim else 0
        if not 1 <= rank <= MAX_RANK:
            raise BadRequest(f"shift.b must have the shape [{rows}, k] with k between 1 and {MAX_RANK}.")
        expected |= {"shift.b": (rows, rank), "shift.a": (rank, columns)}
    if tensors.keys() != expected.keys():
        raise BadRequest(f"Factorize came with the tensors {sorted(tensors)}; expected {sorted(expected)}.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name] or not tensor.is_floating_point():
            raise BadRequest(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; expected floats of shape {list(expected[name])}."
            )
