"""Which methods equal plain PEFT on which families, as a page.

`python -m tests.tools.parity_table > docs/parity.md`
"""

from collections.abc import Iterator

from tests.tools.methods import METHODS, ROUNDED, ROUNDING, TARGETS, TASKS, refusal_of

_CLOSE = f"{ROUNDING:g}".replace("e-0", "e-")
_HEAD = f"""\
# What equals one machine

Made by `python -m tests.tools.parity_table` from what `tests/whole/test_methods.py` runs; do not edit.

Every cell is one test, `tests/whole/test_methods.py::test_equals_local[FAMILY-TASK-METHOD]`: a small random model of
the family in float32 on a swarm of two real peers (blocks 0:2, 2:5), and the same model on one machine in plain PEFT.
Both get the same adapter, moved away from its initial values, and train three optimizer steps on a batch with padding,
without dropout. `tests/tools/methods.py` has each method's options.

- **exact**: every loss, every logit, the gradient of every trainable parameter in every step, and the parameters after
  the last step are equal: a difference of 0.0.
- **{_CLOSE}**: the same within {_CLOSE}, absolute, with SGD instead of AdamW: a peer subtracts from its results what
  PEFT subtracts from its weights.
- **[n]**: plain PEFT cannot do it on one machine, so there is nothing to equal; the test shows that it cannot.

Then each adapter is saved on either side and loaded on the other, and gives the same logits within {_CLOSE}.
`LoRA all-linear` on Mixtral is on the router and the fused experts too; OLoRA on GPT-2 is on square weights only, as
PEFT takes its others for their transposes. Single tests of more methods are in `tests/client/test_adapters.py`.
"""


def page() -> str:
    """The text of docs/parity.md."""
    reasons: dict[str, int] = {}
    tables = [line for task in TASKS for line in _table(task, reasons)]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([_HEAD, *tables, "## Why not", "", *notes, ""])


def _table(task: str, reasons: dict[str, int]) -> Iterator[str]:
    yield from (f"## {task}", "", f"| method | {' | '.join(TARGETS)} |", "|---" * (len(TARGETS) + 1) + "|")
    for method in METHODS:
        yield f"| {method} | {' | '.join(_cell(family, task, method, reasons) for family in TARGETS)} |"
    yield ""


def _cell(family: str, task: str, method: str, reasons: dict[str, int]) -> str:
    if refusal := refusal_of(family, task, method):
        return f"[{reasons.setdefault(refusal.reason, len(reasons) + 1)}]"
    return _CLOSE if method in ROUNDED else "exact"


if __name__ == "__main__":
    print(page(), end="")
