"""The messages of training: Forward and Backward."""

from typing import Any

from peer.adapters.store import StoredAdapter
from peer.compute.scheduler import Priority
from peer.service.adapters import Adapters
from peer.service.connection import Connection
from peer.service.handover import HandOver
from peer.span.checks import check_inputs, check_mode, check_prefix, prefix_length
from peer.span.span import Span
from peer.training.call import TrainingCall
from peer.training.runner import Task, TrainingRunner
from protocol import swarm_pb2 as pb
from protocol.channel import Message
from protocol.errors import BadRequest


class Training:
    """Reads training calls, and has them run. `max_length`: tokens of a row, a KV prefix included."""

    def __init__(self, span: Span, max_length: int, adapters: Adapters, runner: TrainingRunner, hand_over: HandOver):
        self.runner = runner
        self._span, self._max_length, self._adapters, self._hand_over = span, max_length, adapters, hand_over

    async def forward(self, connection: Connection, message: Message, body: pb.Forward) -> Message:
        """Answer with the hidden states after the blocks; keep the activations if asked to."""
        adapter = self._adapters.find(connection, body.context)  # before others' work is waited for
        message = await self._hand_over.await_push(connection, message, body.hand_over)
        call = self._read(message, body.context, adapter)
        hidden, call_id = await self._run(connection, self.runner.forward(call, connection.client, body.keep))
        return await self._hand_over.reply(connection, body, pb.Result(call_id=call_id), {"hidden_states": hidden})

    async def backward(self, connection: Connection, message: Message, body: pb.Backward) -> Message:
        """Answer with the gradients of a kept forward, or of the one whose tensors came again."""
        message = await self._hand_over.await_push(connection, message, body.hand_over)
        grad = message.tensor("grad")
        if not grad.is_floating_point() or grad.ndim != 3 or grad.shape[2] != self._span.hidden_size:
            raise BadRequest(f"grad is {grad.dtype} {list(grad.shape)}; expected the shape of the forward's result.")
        if body.call_id:
            task = self.runner.backward_kept(body.call_id, connection.client, grad)
        else:
            call = self._read(message, body.context, self._adapters.find(connection, body.context))
            if call.inputs.hidden.shape != grad.shape:
                raise BadRequest("grad and hidden_states differ in shape.")
            task = self.runner.backward(call, grad)
        gradients = await self._run(connection, task)
        return await self._hand_over.reply(connection, body, pb.Result(), gradients, "grad.hidden_states")

    def _read(self, message: Message, context: pb.Context, adapter: StoredAdapter | None) -> TrainingCall:
        span = self._span
        mode = check_mode(span, context)
        inputs = check_inputs(span, message, prefix_length(message.tensors), self._max_length)
        prefix = check_prefix(span, mode, message, inputs.hidden.shape[0])
        return TrainingCall(inputs, mode, adapter, prefix)

    async def _run(self, connection: Connection, task: Task) -> Any:
        return await connection.compute_batched(Priority.CALL, self.runner.run, task, task.group, max(1, task.size))
