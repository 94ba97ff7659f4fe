"""Figures: printed and saved when they are known, so that a run that is cut off loses nothing; one table at the end."""

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Figure = float | int | str
Figures = Mapping[str, Figure]
"""What was measured, with its unit, and how much it was."""


class Report:
    """All figures of a run. `budget`: seconds after which nothing more is begun."""

    def __init__(self, folder: Path, title: str, budget: float):
        self.failures: list[str] = []
        self._folder, self._title, self._budget = folder, title, budget
        self._sections: dict[str, dict[str, dict[str, Figure]]] = {}
        self._began = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds."""
        return self._budget - (time.monotonic() - self._began)

    def put(self, section: str, name: str, figures: Figures) -> None:
        """These are known of `name` now."""
        self._sections.setdefault(section, {}).setdefault(name, {}).update(figures)
        print(f"[{time.monotonic() - self._began:6.1f} s] {section}: {name}: {_cell(figures)}", flush=True)
        (self._folder / "results.json").write_text(json.dumps(self._sections, indent=1))
        (self._folder / "table.md").write_text(self.table())

    def attempt(self, section: str, name: str, take: Callable[[], Figures], needs: float = 5.0) -> None:
        """Put what `take` returns, or how it failed; skip it where fewer than `needs` seconds are left.

        `take` may put figures itself as they come, and attempt other things.
        """
        if self.left < needs:
            self.put(section, name, {"skipped": f"{max(0.0, self.left):.0f} s were left, it takes about {needs:.0f}"})
            return
        try:
            if figures := take():
                self.put(section, name, figures)
        except Exception as error:  # on hardware that nobody has tried yet, whatever else works is worth knowing
            traceback.print_exc()
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            self.failures.append(f"{section}: {name}: {reason}")
            self.put(section, name, {"FAILED": reason})
        finally:
            if torch.cuda.is_initialized():
                gc.collect()
                torch.cuda.empty_cache()

    def table(self) -> str:
        """Markdown."""
        rows = [
            f"| {section} | {name} | {_cell(figures)} |"
            for section, items in self._sections.items()
            for name, figures in items.items()
        ]
        return "\n".join([f"{self._title}\n", "| section | what | figures |", "|---|---|---|", *rows, ""])


def _cell(figures: Figures) -> str:
    return "; ".join(f"{name} {_short(value)}" for name, value in figures.items())


def _short(value: Figure) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return " ".join(str(value).replace("|", "/").split())
