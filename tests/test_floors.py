"""Imports go to lower floors or stay in their own room."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "sslrun": 0,  # the package itself: its exports are imported on first use, by name
    "started": -1,  # the package itself limits spinning before its exports import torch
    "errors": 0, "number_format": 0, "glossary": 0,
    "config": 1, "randomness": 1, "scheduled": 1,
    "contract": 2,
    "runtime": 3,
    "data": 4, "nn": 4, "optim": 4,
    "methods": 5, "evaluation": 5,
    "allowed_imports": 4,
    "recipe": 6, "preparation": 6.1, "run_state": 6, "step_metrics": 6.1, "rehearsal": 6.1, "plan": 6.2, "advice": 6.25,
    "initial_weights": 6.2, "gradient_cache": 6.2, "run_parts": 6.25, "session": 6.3,
    "training": 6.4, "saved": 6.4,
    "measure": 7, "preview": 7, "export": 7, "runs": 7, "importer": 7,
    "doctor": 7, "first_recipe": 7, "capacity": 7,
    "finetune": 8, "report": 8, "embedding": 8,
    "commands": 9, "cli": 9.1, "python_api": 9.1, "__main__": 9.2,
}  # fmt: skip
HOME = {  # the one module that may import a library
    "nvidia": "sslrun.data", "deepspeed": "sslrun.runtime.deepspeed_executor",
    "sklearn": "sslrun.report.encoder_outputs", "pyarrow": "sslrun.data.arrow",
}  # fmt: skip


def modules(source_root: str) -> dict[str, Path]:
    files = (ROOT / source_root).rglob("*.py")
    return {
        ".".join(f.relative_to(ROOT / source_root).with_suffix("").parts).removesuffix(".__init__"): f for f in files
    }


ENGINE, KERNELS = modules("engine"), modules("kernels")


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Everything that a file imports, absolute or relative, at any depth; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            yield from (".".join([*parents, *filter(None, [node.module]), alias.name]) for alias in node.names)


def loops(imported: dict[str, set[str]]) -> list[list[str]]:
    """The modules that import each other in a ring, `imported` being what each module imports, at any depth of code."""
    left = {module: others & imported.keys() for module, others in imported.items()}
    while free := {module for module, others in left.items() if not others}:
        left = {module: others - free for module, others in left.items() if module not in free}
    while free := left.keys() - set().union(*left.values()):  # what only imports a ring is not in it
        left = {module: others for module, others in left.items() if module not in free}
    return sorted(sorted({module, *others}) for module, others in left.items())


def when_it_runs(path: Path) -> str:
    """The code of a file without what is for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    is_for_types = [isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING" for n in tree.body]
    tree.body = [node for node, is_typing in zip(tree.body, is_for_types, strict=True) if not is_typing]
    return ast.unparse(tree)


def engine_imports() -> dict[str, set[str]]:
    """The modules that each module of sslrun imports when it runs, inside functions too; not for types alone."""
    found: dict[str, set[str]] = {}
    for module, path in ENGINE.items():
        names = set(imports(when_it_runs(path), module, path.name == "__init__.py"))
        found[module] = {name if name in ENGINE else name.rpartition(".")[0] for name in names} - {module}
    return found


def is_wrong(module: str, imported: str) -> bool:
    """Whether a module of sslrun may not import `imported` (a module, or a name in one)."""
    if imported.split(".")[0] != "sslrun":
        home = HOME.get(imported.split(".")[0], "")
        return not f"{module}.".startswith(f"{home}." if home else "")
    imported = imported.removesuffix(".__version__")
    room, other = (f"{name}.sslrun".split(".")[1] for name in (module, imported))  # "sslrun" for the package itself
    if room == other == "methods":  # methods never know each other
        return module.count(".") == 2
    if other == "importer" != room:  # it is read by its verb alone
        return module != "sslrun.commands.config"
    return room != other and FLOORS.get(other, 99) >= FLOORS[room]


@pytest.mark.parametrize("module", ENGINE)
def test_imports_go_down(module):
    path = ENGINE[module]
    code = when_it_runs(path) if module == "sslrun" else path.read_text(encoding="utf-8")  # its exports have types
    found = imports(code, module, path.name == "__init__.py")
    assert [imported for imported in found if is_wrong(module, imported)] == []


def test_no_modules_import_each_other_in_a_ring():
    assert loops(engine_imports()) == []


def test_a_ring_would_be_seen():
    assert loops({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"], ["b", "c"]]


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_know_torch_and_triton_only(module):
    path = KERNELS[module]
    known = {"torch", "triton", "sslkernels", *sys.stdlib_module_names}
    found = imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert {imported.split(".")[0] for imported in found} <= known


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sslrun.config.load", "import sslrun.runtime.log"),
        ("sslrun.config.load", "def f():\n    from sslrun import training"),
        ("sslrun.data.loader", "from sslrun.nn import resnet"),
        ("sslrun.data.loader", "from ..optim.lars import LARS"),
        ("sslrun.nn.resnet", "from sslrun import Method"),
        ("sslrun.methods.moco", "from sslrun.methods.simclr import SimCLR"),
        ("sslrun.methods.moco", "from . import simclr"),
        ("sslrun.methods.moco", "from .simclr import SimCLR"),
        ("sslrun.evaluation.knn", "from sslrun.methods import Method"),
        ("sslrun.finetune", "from sslrun.importer import import_config"),
        ("sslrun.runtime.executor", "import deepspeed.comm"),
        ("sslrun.nn.resnet", "from nvidia.dali import fn"),
        ("sslrun.report.page", "import sklearn"),
    ],
)
def test_would_be_seen(module, source):
    assert any(is_wrong(module, imported) for imported in imports(source, module))
