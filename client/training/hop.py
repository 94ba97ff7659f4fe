"""One hop of a training call: asked, and by chance computed again by other peers."""

import torch

from client.requests.caller import Caller, Gradients
from client.requests.recompute import BackwardAgain, ForwardAgain
from client.requests.verify import Answer
from client.requests.work import Work
from client.swarm.routes import Hop


class Hops:
    """Training calls on one hop at a time. All methods raise `SwarmError`."""

    def __init__(self, caller: Caller):
        self._caller = caller

    async def forward(self, work: Work, hop: Hop, hidden: torch.Tensor, keep: bool) -> tuple[torch.Tensor, int]:
        """Hidden states after a hop, and the name of the activations that its peer kept (0: none)."""
        caller = self._caller
        output, call_id = await caller.forward(work, hop, hidden, keep)
        if caller.verifier.is_due(work):
            codecs, (got,) = caller.received(work, hop, hidden)
            answer = Answer(hop, "forward", {"hidden_states": output}, {"hidden_states": got}, codecs.back)
            await caller.verifier.check(answer, ForwardAgain(caller, work, hop, got))
        return output, call_id

    async def backward(
        self, work: Work, hop: Hop, hidden: torch.Tensor, grad: torch.Tensor, call_id: int
    ) -> tuple[torch.Tensor, Gradients]:
        """The gradient of a hop's input, and of its adapters and prefixes by name; see `Caller.backward`."""
        caller = self._caller
        found, gradients = await caller.backward(work, hop, hidden, grad, call_id)
        if caller.verifier.is_due(work):
            codecs, (got, grad) = caller.received(work, hop, hidden, grad)
            tensors = {"hidden_states": found, **gradients}
            answer = Answer(hop, "backward", tensors, {"hidden_states": grad}, codecs.gradients)
            await caller.verifier.check(answer, BackwardAgain(caller, work, hop, got, grad))
        return found, gradients
