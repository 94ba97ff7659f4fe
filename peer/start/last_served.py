"""What this machine served last in a private swarm: with it a peer goes on after a restart with nothing typed."""

import logging
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError

from bootstrap.membership.folder import SwarmFolder
from protocol.machine.private_files import write_private

_log = logging.getLogger(__name__)


class LastServed(BaseModel):
    """A model, and which of its blocks."""

    place: str
    """Its folder (what was fetched has one too), or its hub name."""
    revision: str | None
    called: str | None
    """What the swarm calls it; None: by its place."""
    config_hash: str
    blocks: str
    """START:END."""

    @classmethod
    def read(cls, swarm: SwarmFolder) -> Self | None:
        """What was written; None: nothing yet, or nothing of use."""
        try:
            return cls.model_validate_json(_path(swarm).read_bytes())
        except (OSError, ValidationError):
            return None

    def write(self, swarm: SwarmFolder) -> None:
        """Have it read the next time."""
        try:
            write_private(_path(swarm), self.model_dump_json().encode())
        except OSError as error:
            _log.warning("%s cannot be written (%s); name the model at the next start.", _path(swarm), error.strerror)


def _path(swarm: SwarmFolder) -> Path:
    return swarm.models / "served.json"
