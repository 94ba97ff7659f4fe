"""What `model.swarm` shows of the network."""

from typing import Any

from client.model.pseudo_layer import PseudoLayer
from client.model.remote_blocks import RemoteBlocks
from client.swarm.config import SwarmConfig
from client.swarm.health import Health
from client.swarm.routes import Hop
from client.swarm.swarm import Purpose, Swarm
from protocol.records import PeerRecord


class SwarmHandle:
    """The swarm as a model uses it. A copy of the model has a handle of its own blocks to the same membership."""

    def __init__(self, network: Swarm, layer: PseudoLayer, blocks: RemoteBlocks):
        self.network = network
        """The membership itself; its coroutines are for this process's loop."""
        self.layer = layer
        """What the model's trunk runs in the place of its blocks."""
        self.blocks = blocks
        """All blocks of the model, callable on hidden states, with autograd."""

    def peers(self) -> list[PeerRecord]:
        """The peers that serve this model now. Raises `PeerUnreachable`."""
        return self.network.loop.run(self.network.fetch_peers(fresh=True))

    def route(self, purpose: Purpose = "decode") -> list[Hop]:
        """The hops that work would take now. Raises `NoRoute`."""
        return self.network.loop.run(self.network.find_route(0, self.network.model_id.num_blocks, purpose))

    @property
    def health(self) -> Health:
        """What this client learned of peers by using them."""
        return self.network.health

    @property
    def config(self) -> SwarmConfig:
        """The options that the model was made with."""
        return self.network.config


def swarm_of(model: Any) -> SwarmHandle:
    """The `model.swarm` of a distributed model, typed; PEFT's wrappers are looked through."""
    swarm = model.swarm
    assert isinstance(swarm, SwarmHandle)
    return swarm
