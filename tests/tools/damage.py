"""Changes to the files of a model's folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG, INDEX = "config.json", "model.safetensors.index.json"


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change a JSON file's entries; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change
