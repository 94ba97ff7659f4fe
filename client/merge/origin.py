"""Which model an adapter was trained on, as its own config says, against what a user says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol.model.checkpoint import may_be_on_hub


def choose_revision(adapter: Mapping[str, Any], base: str, revision: str | None) -> tuple[str | None, list[str]]:
    """The revision of `base` (a folder or hub name) to put an adapter on, and a sentence for each thing that the
    adapter says otherwise.

    It is the `revision` that a user asked for; without one it is that of the adapter's training, if `base` is the model
    of its training. `adapter`: the keys of its adapter_config.json.
    """
    name, trained = adapter.get("base_model_name_or_path"), adapter.get("revision")
    if not isinstance(name, str) or not name:
        return revision, []
    trained = trained if isinstance(trained, str) else None
    if _on_hub(base) and base.casefold() == name.casefold():
        if revision in (None, trained) or trained is None:
            return revision or trained, []
        return revision, [f"Note that the adapter was trained on revision {trained} of {name}, not on {revision}."]
    if (_on_hub(base) and _on_hub(name)) or Path(name).name.casefold() != Path(base).name.casefold():
        return revision, [f"Note that the adapter names another base: {name}."]
    if trained is None:
        return revision, []
    return revision, [f"Note that the adapter was trained on revision {trained} of {name}; expected that in {base}."]


def _on_hub(name: str) -> bool:
    return may_be_on_hub(name) and not name.startswith("~") and not Path(name).is_dir()
