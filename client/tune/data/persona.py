"""The persona data set that comes with hivetune: instructions in Alpaca format, for teaching a model who it is."""

from importlib import resources
from pathlib import Path

PERSONA_NAME = "Juniper"


def persona_path() -> Path:
    """The JSON Lines file; each line is `{"instruction": str, "input": str, "output": str}`."""
    return Path(str(resources.files("client.tune.data") / "persona.jsonl"))
