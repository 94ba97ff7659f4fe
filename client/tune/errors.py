"""What goes wrong in a run for a reason its user can act on.

The text of each error is one sentence, meant to be shown as it is.
"""

from protocol.errors import BadUsage, SwarmError


class TuneError(SwarmError):
    """Base of all of them; a command prints its text and leaves with exit code 1, without a traceback."""


class ConfigError(TuneError, BadUsage, ValueError):
    """The run's description can't be carried out: a key, a value, or two values that exclude each other."""


class DataError(TuneError, BadUsage, ValueError):
    """A data file can't be used; the text names the file and the line or record."""


class OutputError(TuneError, RuntimeError):
    """The output folder can't be used or written to."""


class DivergedError(TuneError, RuntimeError):
    """The loss or the gradient stopped being a number."""


class Interrupted(TuneError, RuntimeError):
    """The user stopped the run (Ctrl-C); the text says what was kept and how to go on."""
