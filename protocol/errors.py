"""Typed errors that survive the wire: a peer raises one, its caller catches the same class with the same sentence."""

from typing import TYPE_CHECKING

from protocol import swarm_pb2 as pb

if TYPE_CHECKING:
    from pydantic import ValidationError


class SwarmError(Exception):
    """Anything that goes wrong in a swarm. The message is one sentence for a person."""

    retry_after: float = 0.0
    """Seconds after which the same peer may be asked again; 0: it would refuse again."""
    advice: str = ""
    """How to find out more: a sentence, which also stands below a traceback."""

    def __init__(self, *args: object):
        super().__init__(*args)
        if self.advice:
            self.add_note(self.advice)


class _Puzzle(SwarmError):
    """What may have its cause in this machine, the network or the swarm."""

    advice = "`peer doctor` looks for the cause."


class BadRequest(SwarmError):
    """The request itself is wrong (shape, dtype, name, range); no peer would accept it."""


class WrongModel(SwarmError):
    """The two ends hold different models, or different revisions of one."""


class NotAMember(_Puzzle):
    """One end is no member of the private swarm that the other is in: not yet, not any more, or of another one."""


class NotAllowed(SwarmError):
    """A member's role does not allow what it asks for."""


class PeerFull(SwarmError):
    """The peer has no room (sessions, cache tokens, adapters) at present."""

    retry_after = 5.0


class OverQuota(PeerFull):
    """This client has as much of the peer as one client may."""

    retry_after = 2.0


class SessionLost(SwarmError):
    """The peer gave a session's memory to others, or never had it; what the cache held must be sent again."""


class NotPushed(SwarmError):
    """What another peer was to push for a request did not come."""


class TooLong(SwarmError):
    """A prompt or a session is longer than the peer allows."""


class UnknownAdapter(SwarmError):
    """The peer does not hold the adapter bundle that a request names; put it and repeat."""


class UnknownCall(SwarmError):
    """The peer no longer keeps the activations that a Backward request names; send the forward's inputs with it."""


class BadAdapter(SwarmError):
    """An adapter's method, configuration or tensors are not acceptable."""


class OutOfMemory(SwarmError):
    """One request did not fit the peer's memory; the peer lives on."""

    retry_after = 1.0


class Draining(SwarmError):
    """The peer is leaving and takes no new work."""


class PeerFailed(_Puzzle):
    """The peer failed for a reason of its own."""


class PeerUnreachable(_Puzzle):
    """A peer cannot be reached, or its connection broke or fell silent."""


class NoConnection(PeerUnreachable):
    """No connection to a peer came about: nothing was asked of it."""


class NoSwarm(PeerUnreachable):
    """None of the initial peers answers: an address is wrong, or the swarm is gone."""


class ClocksDiffer(NoSwarm):
    """A member's clock and this machine's differ by more than the directory bears."""


class NoRoute(_Puzzle):
    """Some blocks are served by nobody."""


class NoWeights(SwarmError):
    """Nobody in the swarm gives some of a model's files."""


class UnsupportedModel(SwarmError):
    """The span approach cannot run this architecture, or the folder is not a usable model."""


class BadUsage(SwarmError):
    """An option or an argument that the user gave is wrong."""


_BY_NAME = {
    cls.__name__: cls
    for cls in (
        BadRequest, WrongModel, NotAMember, NotAllowed, PeerFull, OverQuota, SessionLost, TooLong, UnknownAdapter,
        UnknownCall, BadAdapter, OutOfMemory, Draining, PeerFailed, NotPushed,
    )
}  # fmt: skip
_MAX_MESSAGE = 2000


def first_line(error: BaseException) -> str:
    """The first line of a library's error, at most 300 characters, without a full stop: to stand within a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(" .:")[:300]


def first_problem(error: "ValidationError") -> tuple[str, str]:
    """What pydantic refused first: its place (keys with dots between; empty: the whole), and what is wrong with it."""
    problem = error.errors()[0]
    return ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")


def to_failure(error: BaseException) -> pb.Failure:
    """The wire form of `error`; what is not a `SwarmError` becomes `PeerFailed` without its details' traceback."""
    if isinstance(error, SwarmError) and type(error).__name__ in _BY_NAME:
        return pb.Failure(kind=type(error).__name__, message=str(error)[:_MAX_MESSAGE], retry_after=error.retry_after)
    return pb.Failure(kind="PeerFailed", message=f"{type(error).__name__}: {error}"[:_MAX_MESSAGE])


def from_failure(failure: pb.Failure, remote: str) -> SwarmError:
    """The error that the peer `remote` reported. What it says is shown to people: a bounded line, nothing else."""
    line = "".join(letter if letter.isprintable() else " " for letter in failure.message[:_MAX_MESSAGE])
    error = _BY_NAME.get(failure.kind, PeerFailed)(f"{line.rstrip('.')} (peer {remote}).")
    error.retry_after = min(failure.retry_after, 600.0) if failure.retry_after > 0 else 0.0  # 0 also for NaN
    return error
