"""Swarm keys for tests."""

from protocol.swarm_key import SwarmKey

OURS, THEIRS, NEW = (SwarmKey(bytes([number]) * 32) for number in (1, 2, 3))
