"""The messages ReadWeight and Factorize: what a client needs of base weights to initialise an adapter."""

from functools import partial

import torch

from peer.base_weights.factors import check_factorize, factorize
from peer.base_weights.norms import read_norm
from peer.compute.scheduler import Priority
from peer.service.connection import Connection
from peer.span.span import Span
from peer.span.transfer import all_to_host
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.errors import BadRequest
from protocol.tensors import torch_dtype

_MAX_NAMES = 4096


class BaseWeights:
    """Computes row norms and factors of a span's weights."""

    def __init__(self, span: Span):
        self._span = span

    async def read(self, connection: Connection, message: Message, body: pb.ReadWeight) -> Message:
        """Answer with the norm of each weight named."""
        dtype = torch_dtype(body.dtype)
        if dtype is None or not dtype.is_floating_point or len(body.names) > _MAX_NAMES:
            raise BadRequest(f"ReadWeight needs a floating dtype and at most {_MAX_NAMES} names.")
        dims = tuple(body.norm_dims)

        def read() -> dict[str, torch.Tensor]:
            norms = (read_norm(self._span, name, body.transposed, dims, dtype) for name in body.names)
            return all_to_host({f"value.{i}": norm for i, norm in enumerate(norms)})

        return Message(pb.Result(), await connection.compute(Priority.CALL, read))

    async def factorize(self, connection: Connection, message: Message, body: pb.Factorize) -> Message:
        """Answer with the leading factors of a weight."""
        job = check_factorize(self._span, body, message.tensors)
        return Message(pb.Result(), await connection.compute(Priority.CALL, partial(factorize, job)))
