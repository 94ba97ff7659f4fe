"""Why somebody is not let in: one sentence for each reason."""

from enum import IntEnum

from protocol.errors import ClocksDiffer, NotAMember, PeerUnreachable, SwarmError


class Refusal(IntEnum):
    """The reasons; their numbers cross the wire."""

    STRANGER = 1
    OTHER_SWARM = 2
    OPEN = 3
    CLOCKS_DIFFER = 4
    REPEATED = 5
    EXPIRED = 6
    REVOKED = 7
    ISSUER_REVOKED = 8
    TOO_LATE = 9
    OTHER_PROCESS = 10

    def sentence(self, who: str = "this machine") -> str:
        """What is wrong with `who`, and what to do about it."""
        return _SENTENCES[self].format(who=who)

    def error(self, who: str = "this machine") -> SwarmError:
        """The error for it."""
        if self is Refusal.CLOCKS_DIFFER:
            return ClocksDiffer(self.sentence())
        if self is Refusal.REPEATED:
            return PeerUnreachable(self.sentence())
        return NotAMember(self.sentence(who))


_AGAIN = "ask an admin for a new ticket (`peer invite`), and join with it."
_SENTENCES = {
    Refusal.STRANGER: "This swarm is private: join it with `peer join TICKET`, and name it with --swarm "
    "(in Python: swarm=).",
    Refusal.OTHER_SWARM: "The membership of {who} is one of another swarm: name the right one with --swarm.",
    Refusal.OPEN: "A member of a private swarm called, but this swarm is open: say --swarm open.",
    Refusal.CLOCKS_DIFFER: "its clock and this machine's differ by more than 3 s; set both, by NTP for instance",
    Refusal.REPEATED: "it took a request for the repetition of another",
    Refusal.EXPIRED: "The membership of {who} has expired, and no admin was there to renew it: " + _AGAIN,
    Refusal.REVOKED: "The membership of {who} has been revoked; to come back, " + _AGAIN,
    Refusal.ISSUER_REVOKED: "The admin who let {who} in has been revoked: " + _AGAIN,
    Refusal.TOO_LATE: "Another machine has used the ticket of {who} before: " + _AGAIN,
    Refusal.OTHER_PROCESS: "The certificate of {who} is another process's; start this one again.",
}


class Refused(Exception):
    """Somebody is not let in."""

    def __init__(self, why: Refusal):
        super().__init__(why)
        self.why = why
