"""What a generation's session is made of: a stage per hop, and the parts of a step that go through it."""

from dataclasses import dataclass, field

from client.generation.history import History
from client.swarm.routes import Hop
from protocol.channel import Channel
from protocol.errors import SwarmError


@dataclass
class Stage:
    """One hop's session on its peer."""

    hop: Hop
    channel: Channel | None
    """None: there is no such session, it is to be made from the history."""
    number: int = 0
    """Of the last step done."""
    history: History = field(default_factory=History)
    """Hidden states that went in."""
    leaving: bool = False
    """Its peer has said that it is about to leave."""
    error: SwarmError | None = None
    """With which its peer failed, if that has not been taken note of yet."""
