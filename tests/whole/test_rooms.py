"""The rooms of the architecture and what each may import; file sizes; no pickle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("protocol", "bootstrap", "peer", "client")
MAY_IMPORT: dict[str, str] = {
    "protocol/machine": "protocol/errors",
    "protocol": "",
    "protocol/model": "protocol protocol/machine",
    "protocol/weights": "protocol protocol/machine protocol/model protocol/transport",
    "protocol/transport": "protocol",
    "protocol/membership": "protocol",
    "bootstrap/membership": "protocol/*",
    "bootstrap/discovery": "bootstrap/addresses bootstrap/membership protocol/*",
    "bootstrap": "bootstrap/membership bootstrap/discovery protocol/*",
    "peer/weights": "protocol/*",
    "peer/compute": "",
    "peer/kv_cache": "protocol/*",
    "peer/span": "peer/kv_cache protocol/*",
    "peer/base_weights": "peer/span protocol/*",
    "peer/adapters": "peer/span protocol/*",
    "peer/generation/joined": "peer/adapters peer/span peer/kv_cache protocol/*",
    "peer/generation": "peer/generation/joined peer/adapters peer/span peer/kv_cache peer/compute protocol/*",
    "peer/training/joined": "peer/adapters peer/span protocol/*",
    "peer/training": "peer/training/joined peer/adapters peer/span peer/kv_cache peer/compute protocol/*",
    "peer/service": "peer/generation peer/training peer/adapters peer/base_weights peer/weights peer/span "
    "peer/kv_cache peer/compute bootstrap/* protocol/*",
    "peer/start": "peer/service peer/weights peer/generation peer/generation/joined peer/training peer/training/joined "
    "peer/adapters peer/span peer/kv_cache peer/compute bootstrap/* protocol/*",
    "peer/doctor": "peer/start peer/span bootstrap/* protocol/*",
    "peer": "peer/commands/app peer/start peer/service peer/weights peer/compute bootstrap/* protocol/*",
    "peer/commands": "peer peer/doctor peer/weights peer/start peer/service bootstrap/* protocol/*",
    "client/swarm": "bootstrap/* protocol/*",
    "client/ghosts": "client/swarm protocol/*",
    "client/adapters": "client/ghosts protocol/*",
    "client/requests": "client/adapters client/swarm protocol/*",
    "client/generation": "client/requests client/swarm protocol/*",
    "client/training": "client/requests client/swarm protocol/*",
    "client/model": "client/generation client/training client/requests client/adapters client/ghosts client/swarm "
    "bootstrap/* protocol/*",
    "client": "client/model client/swarm protocol/*",
    "client/tune": "protocol/*",
    "client/tune/data": "client/tune client protocol/*",
    "client/tune/description": "client/tune/data client/tune client/swarm protocol/*",
    "client/tune/running": "client/tune/description client/tune/data client/tune client protocol/*",
    "client/merge": "protocol/*",
    "client/certify": "client/tune/data client protocol/*",
    "client/gateway/engine": "client/model client/generation client/requests client protocol/*",
    "client/gateway": "client/gateway/engine client protocol/*",
    "client/commands": "client/gateway client/certify client/merge client/tune/* client client/model client/swarm "
    "bootstrap/* protocol/*",
}
"""Folder -> the folders, or single files of them, whose code its own may use; `/*` stands for all below as well.

Downwards only: no folder may be reached again from what it uses.
"""
EXCEPTIONS: dict[str, str] = {}
"""File -> one more that it uses for a reason; this list may only shrink."""
BENDING = "protocol/model/forwards.py"
"""The only file that replaces a forward, a class or an attention function of a module, or adds hooks to one."""
BENDS_ITS_OWN = {"client/model/build.py", "client/model/saving.py", "client/certify/boundaries.py"}
"""Files that hook models which no peer serves, by PyTorch's and Transformers' own calls: that of a client's user, to
catch what its blocks are called with, and one that is certified. This list may only shrink."""
BENT = {"forward", "__class__", "_attn_implementation"}
COMMANDS = "peer/commands/"
"""What people type: only these reach from `peer` into `client`, and only from inside a function."""
MOST_FILES = {"protocol": 14}
"""Folders of more than 12 files, each one concept that has no parts."""
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SLOW = {
    "peft", "bitsandbytes", "accelerate", "datasets", "matplotlib", "starlette", "uvicorn", "llguidance",
    "prometheus_client",
}  # fmt: skip
GENERATED = {"protocol/swarm_pb2.py", "protocol/membership/membership_pb2.py"}


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


def file_of(module: str) -> str:
    """The file or the folder that an import of `module` leads to, without suffix."""
    return module.replace(".", "/")


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def may_import(path: str, target: str) -> bool:
    """Whether the code of a file may import `target`, a file without suffix."""
    own = folder_of(path)
    is_folder = (ROOT / target).is_dir() and not (ROOT / f"{target}.py").exists()
    folder = target if is_folder else folder_of(target)
    if folder == own or EXCEPTIONS.get(path) == target:
        return True
    return any(
        rule in (folder, target) or (rule.endswith("/*") and f"{folder}/".startswith(rule.removesuffix("*")))
        for rule in MAY_IMPORT[own].split()
    )


def foreign_imports(path: str) -> list[str]:
    return [
        module
        for module, is_lazy in imports(path)
        if module.partition(".")[0] in ROOMS
        and not may_import(path, file_of(module))
        and not (path.startswith(COMMANDS) and is_lazy and module.partition(".")[0] == "client")
    ]


def test_folders_import_only_what_they_may() -> None:
    found = {path: foreign for path in sources(*ROOMS) if (foreign := foreign_imports(path))}
    assert found == {}


def test_the_rules_lead_downwards() -> None:
    """Sorted by them, every folder stands above all that it uses; a rule that names a file of a folder stands aside."""
    order = TopologicalSorter[str]()
    for folder, rules in MAY_IMPORT.items():
        order.add(folder, *(rule for rule in rules.split() if rule in MAY_IMPORT and rule != folder))
    list(order.static_order())  # raises CycleError


def test_no_file_is_in_a_circle() -> None:
    order = TopologicalSorter[str]()
    for path in sources(*ROOMS):
        for module, is_lazy in imports(path):
            target = f"{file_of(module)}.py"
            if not is_lazy and (ROOT / target).exists():
                order.add(path, target)
    list(order.static_order())


def bends(tree: ast.AST) -> list[str]:
    """The statements that replace how a module runs, or hook into it."""
    return [ast.unparse(node) for node in ast.walk(tree) if _bends(node)]


def _bends(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and node.attr in BENT:
        return not isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in BENT:
        return not isinstance(node.ctx, ast.Load)  # of a module's __dict__
    if not isinstance(node, ast.Call):
        return False
    called, _, name = ast.unparse(node.func).rpartition(".")
    is_hook = name.startswith("register_") and name.endswith("_hook") and ("forward" in name or "backward" in name)
    is_attention = name == "register" and "attention" in called.lower()
    sets = name in ("setattr", "__setattr__") and any(
        isinstance(a, ast.Constant) and a.value in BENT for a in node.args
    )
    return is_hook or is_attention or sets or name == "functional_call"


def test_one_file_bends_a_model() -> None:
    found = {path for path in sources(*ROOMS) if bends(ast.parse((ROOT / path).read_text()))}
    assert found == {BENDING} | BENDS_ITS_OWN


@pytest.mark.parametrize(
    "code",
    [
        "module.forward = other",
        "del module.forward",
        "module.__dict__['forward'] = other",
        "vars(module)['forward'] = other",
        "a, module.__class__ = 1, Other",
        "config._attn_implementation = 'other'",
        "object.__setattr__(module, 'forward', other)",
        "setattr(module, 'forward', other)",
        "module.register_forward_pre_hook(hook)",
        "torch.nn.modules.module.register_module_full_backward_hook(hook)",
        "AttentionInterface.register('other', attend)",
        "ALL_MASK_ATTENTION_FUNCTIONS.register('other', attend)",
        "torch.func.functional_call(module, tensors)",
    ],
)
def test_the_check_sees_every_way_to_bend(code: str) -> None:
    assert bends(ast.parse(code))
    assert not bends(ast.parse("print(module.forward, type(module).__class__, vars(module)['forward'])"))


def test_every_folder_says_what_it_is() -> None:
    for folder in MAY_IMPORT:
        docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
        assert len(docstring) > 40, folder


def test_no_folder_is_crowded() -> None:
    files = {folder: len(list((ROOT / folder).glob("*.py"))) - 1 for folder in MAY_IMPORT}
    assert {folder: count for folder, count in files.items() if count > MOST_FILES.get(folder, 12)} == {}
    assert {str(path.parent.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py")} == set(
        MAY_IMPORT
    )


def test_the_check_sees_every_kind_of_import() -> None:
    code = "import a\nfrom b.c import d\nclass E:\n    import f\n    def g(self):\n        from h import i\n"
    assert list(_imports(ast.parse(code), False)) == [("a", False), ("b.c", False), ("f", False), ("h", True)]


def eager_imports(path: str) -> set[str]:
    """The modules that importing a file imports, those for type checkers left out."""
    nodes: list[ast.AST] = list(ast.parse((ROOT / path).read_text()).body)
    return {
        name for node in nodes if not isinstance(node, ast.If) for name, is_lazy in _imports(node, False) if not is_lazy
    }


@pytest.mark.parametrize("start", ["client/model/load.py", "peer/commands/app.py", "peer/server.py"])
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
