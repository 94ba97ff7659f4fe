"""The documents speak of files and modules that are there, and stay readable."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"))
    if path.name != "CHANGELOG.md"  # it names what is gone
)
_OURS = r"(?:protocol|bootstrap|peer|client|tests|benchmarks|examples|docs)"


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if file.exists():
            rest = parts[count:]
            return not rest or re.search(rf"\b{re.escape(rest[0])}\b", file.read_text()) is not None
    return False


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_named_is_there(document: str) -> None:
    text = (ROOT / document).read_text()
    paths = re.findall(rf"`({_OURS}/[\w./]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert [link for link in links if not (ROOT / document).parent.joinpath(link).exists()] == []
    names = re.findall(rf"`({_OURS}(?:\.\w+)+)`", text) + re.findall(r"python -m (benchmarks\.\w+)", text)
    assert [name for name in names if not name.endswith((".md", ".py", ".proto")) and not exists(name)] == []


@pytest.mark.parametrize("build", ["", "+cpu", "+cu126", "+rocm7.2", "+xpu"])
def test_the_constraints_leave_the_build_of_torch_to_the_user(build: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (torch,) = (Requirement(line) for line in lines if line.startswith("torch=="))
    (version,) = (pin.version for pin in torch.specifier)
    assert torch.specifier.contains(version + build)


def test_every_row_of_compatibility_is_held() -> None:
    defined = re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py")))
    rows = re.findall(r"^\|(?!---).*\|(.*)\|$", (ROOT / "docs" / "compatibility.md").read_text(), re.M)
    assert [row for row in rows if row.strip() != "test" and "test_" not in row] == []
    assert set(re.findall(r"`(test_\w+)`", "".join(rows))) <= set(defined)


def test_the_map_is_read_in_ten_minutes() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert [cell for cell in cells if len(cell) > 200] == []
    assert len(text.split()) < 2500
