"""The rooms of the architecture and what each may import; file sizes; no pickle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("protocol", "bootstrap", "peer", "client")
MAY_IMPORT = {
    "protocol": {"protocol"},
    "bootstrap": {"bootstrap", "protocol"},
    "peer": {"peer", "bootstrap", "protocol"},
    "client": {"client", "bootstrap", "protocol"},
}
COMMANDS = {"peer/cli.py", "peer/options.py", "peer/demo.py", "client/cli.py"}
"""What commands consist of: these may reach into the other room, from inside a function."""
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SLOW = {"peft", "bitsandbytes", "accelerate", "datasets", "matplotlib"}
GENERATED = {"protocol/swarm_pb2.py"}


def sources(*folders: str) -> list[str]:
    found = sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found
    return [path for path in found if path not in GENERATED]


def imports(path: str) -> Iterator[tuple[str, bool]]:
    """The modules that a file imports, and whether it does so inside a function."""
    return _imports(ast.parse((ROOT / path).read_text()), is_lazy=False)


def _imports(node: ast.AST, is_lazy: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, is_lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute, so that they can be read and checked"
        yield str(node.module), is_lazy
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, is_lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def foreign_imports(path: str) -> list[str]:
    room = path.partition("/")[0]
    return [
        module
        for module, is_lazy in imports(path)
        if (other := module.partition(".")[0]) in ROOMS
        and other not in MAY_IMPORT[room]
        and not (path in COMMANDS and is_lazy)
    ]


def test_rooms_import_only_what_they_may() -> None:
    found = {path: foreign for path in sources(*ROOMS) if (foreign := foreign_imports(path))}
    assert found == {}


def test_the_check_sees_every_kind_of_import() -> None:
    code = "import a\nfrom b.c import d\nclass E:\n    import f\n    def g(self):\n        from h import i\n"
    assert list(_imports(ast.parse(code), False)) == [("a", False), ("b.c", False), ("f", False), ("h", True)]


def eager_imports(path: str) -> set[str]:
    """The modules that importing a file imports, those for type checkers left out."""
    nodes: list[ast.AST] = list(ast.parse((ROOT / path).read_text()).body)
    return {
        name for node in nodes if not isinstance(node, ast.If) for name, is_lazy in _imports(node, False) if not is_lazy
    }


@pytest.mark.parametrize("start", ["client/load.py", "peer/cli.py", "peer/server.py"])
def test_what_starts_imports_nothing_slow(start: str) -> None:
    """PEFT imports bitsandbytes, and that torch's compiler: seconds that a client without adapters need not wait."""
    waiting, seen = {start}, set[str]()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        modules = eager_imports(path)
        assert not {module.partition(".")[0] for module in modules} & SLOW, path
        own = {f"{module.replace('.', '/')}.py" for module in modules if module.partition(".")[0] in ROOMS}
        waiting |= {path for path in own if (ROOT / path).exists()} - seen
    assert len(seen) > 5


def test_no_file_is_long() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources(*ROOMS, "tests", "benchmarks")}
    assert {path: length for path, length in lengths.items() if length > 500} == {}


def test_nothing_is_unpickled() -> None:
    for path in sources(*ROOMS):
        assert not [module for module, _ in imports(path) if module.partition(".")[0] in PICKLES], path
        for call in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
                weights_only = [ast.unparse(k.value) for k in call.keywords if k.arg == "weights_only"]
                assert weights_only == ["True"], f"{path}:{call.lineno}: torch.load may run code from a file"
