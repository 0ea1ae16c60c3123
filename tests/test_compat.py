"""Private names, patches and registrations of upstream libraries: in ``compat`` alone, each with its versions."""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.autograd import Function

from moslora.compat import hooks

PACKAGE = Path(__file__).parents[1] / "src" / "moslora"
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
COMPAT = [module for module in MODULES if module.startswith("compat.") and not module.endswith("__init__")]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_upstream(dotted: str) -> bool:
    package = dotted.split(".")[0]
    return package not in ("", "moslora") and package not in sys.stdlib_module_names


def upstream_names(tree: ast.Module) -> dict[str, str]:
    """Return the names that a file's imports bind to parts of upstream libraries, with what they are."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_upstream(alias.name):
                    names[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom) and not node.level and is_upstream(node.module or ""):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted_of(node: ast.AST, names: dict[str, str]) -> str | None:
    """Return the dotted path in an upstream library that an expression reads; None if it reads none."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def targets(node: ast.AST) -> list[ast.expr]:
    """Return what a statement assigns to, or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        flat = []
        for target in node.targets:
            flat += target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
        return flat
    return [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []


CHANGES_OF_DICT = {"update", "setdefault", "pop", "clear", "popitem"}


def local_instances(tree: ast.Module) -> set[str]:
    """Return names that are also bound by an assignment or as an argument, so that they may be no import here."""
    bound = {
        a.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.arguments)
        for a in node.args + node.kwonlyargs
    }
    for node in ast.walk(tree):
        bound |= {t.id for t in targets(node) if isinstance(t, ast.Name)}
    return bound


def reaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield where a file imports or reads private names of upstream libraries, or changes a library."""
    names = upstream_names(tree)
    certain = {name: path for name, path in names.items() if name not in local_instances(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_upstream(alias.name) and any(map(is_private, alias.name.split("."))):
                    yield node.lineno, f"imports {alias.name}"
        elif isinstance(node, ast.ImportFrom) and not node.level and is_upstream(node.module or ""):
            for alias in node.names:
                if any(map(is_private, [*str(node.module).split("."), alias.name])):
                    yield node.lineno, f"imports {node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            path = dotted_of(node.value, names)
            if path is not None:
                yield node.lineno, f"reads {path}.{node.attr}"
        for target in targets(node):
            if isinstance(target, ast.Attribute | ast.Subscript):
                path = dotted_of(target, certain)
                if path is not None:
                    yield target.lineno, f"changes {path}"
        if isinstance(node, ast.Call):
            called = node.func
            if node.args and isinstance(called, ast.Name) and called.id in ("setattr", "delattr"):
                path = dotted_of(node.args[0], certain)
                if path is not None:
                    yield node.lineno, f"changes {path}"
            if isinstance(called, ast.Name) and called.id == "getattr" and len(node.args) > 1:
                path, name = dotted_of(node.args[0], certain), node.args[1]
                if path is not None and isinstance(name, ast.Constant) and is_private(str(name.value)):
                    yield node.lineno, f"reads {path}.{name.value}"
            if isinstance(called, ast.Attribute) and called.attr in CHANGES_OF_DICT:
                path = dotted_of(called.value, certain)
                if path is not None and re.search(r"\.[A-Z][A-Z_]+$", path):  # a table of a module
                    yield node.lineno, f"changes {path}"


def changes_environment(node: ast.AST) -> bool:
    """Tell whether a statement changes ``os.environ``."""
    if any("os.environ" in ast.unparse(target) for target in targets(node)):
        return True
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    return node.func.attr in CHANGES_OF_DICT and ast.unparse(node.func.value) == "os.environ"


def environment_that_stays(tree: ast.AST, undone: bool = False) -> Iterator[int]:
    """Yield the lines that change ``os.environ`` in a function that does not put it back when it ends."""
    for node in ast.iter_child_nodes(tree):
        inside = undone
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            endings = [part for n in ast.walk(node) if isinstance(n, ast.Try) for part in n.finalbody]
            inside = any("environ" in ast.unparse(part) for part in endings)
        if not inside and changes_environment(node):
            yield node.lineno  # type: ignore[attr-defined]
        yield from environment_that_stays(node, inside)


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


OTHERS = [module for module in MODULES if not module.startswith("compat.")]


@pytest.mark.parametrize("module", OTHERS)
def test_only_compat_reaches_into_other_libraries(module: str) -> None:
    where = MODULES[module].relative_to(PACKAGE.parent)
    found = [f"{where}:{line} {what}" for line, what in reaches(parsed(module))]
    found += [
        f"{where}:{line} changes os.environ for good" for line in environment_that_stays(parsed(module))
    ]
    assert not found, "move to moslora/compat, with its reason and versions:\n" + "\n".join(found)


BAD = [
    "from torch._C import x",
    "import torch._dynamo",
    "from peft.tuners.tuners_utils import _get_in_out_features",
    "import torch\ntorch._C.f()",
    "from torch import nn\nnn.ConvNd._conv_forward(x)",
    "from peft.tuners.lora import LoraModel\nLoraModel._replace_module",
    "import peft.mapping\npeft.mapping.TABLE['a'] = 1",
    "from transformers import Trainer\nTrainer.attr = 1",
    "from transformers import Trainer\nsetattr(Trainer, 'a', 1)",
    "from transformers import Trainer\ndel Trainer.a",
    "import peft.mapping as m\nm.TABLE.update(a=1)",
    "def f():\n    import trl\n    trl.a = 1",
    "import trl\ngetattr(trl, '_a')",
]
GOOD = [
    "import torch\ntorch.nn.Linear(1, 2).bias = None",
    "from moslora.a import _b",
    "import os, sys\nsys._getframe()",
    "from torch import Tensor\nx: Tensor = 1\nx.data = 2",
    "def f(trainer):\n    trainer.a = 1",
]


@pytest.mark.parametrize("code", BAD)
def test_reaching_into_a_library_is_seen(code: str) -> None:
    assert list(reaches(ast.parse(code)))


@pytest.mark.parametrize("code", GOOD)
def test_other_code_is_not_taken_for_it(code: str) -> None:
    assert not list(reaches(ast.parse(code)))


def test_an_environment_that_stays_changed_is_seen_and_one_that_is_put_back_is_not() -> None:
    bad = "import os\ndef f():\n    os.environ['a'] = 'b'"
    good = f"{bad}\n    try:\n        yield\n    finally:\n        del os.environ['a']"
    assert list(environment_that_stays(ast.parse(bad))) == [3]
    assert not list(environment_that_stays(ast.parse(good)))
    assert list(environment_that_stays(ast.parse("import os\nos.environ.pop('a')"))) == [2]


# ---- Every entry has its versions ----------


def functions_and_classes(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node


# An entry says the versions of its private helpers, too. Patches are private, and entries all the same.
PATCHES = re.compile(r"peft\.patches$")


@pytest.mark.parametrize("module", COMPAT)
def test_every_entry_says_in_which_versions_it_was_seen(module: str) -> None:
    tree = parsed(module)
    assert ast.get_docstring(tree), module
    for node in functions_and_classes(tree):
        is_entry = not node.name.startswith("_") or PATCHES.search(module)
        if is_entry and node.name != "_marked":
            assert re.search(r"\d\.\d+", ast.get_docstring(node) or ""), (
                f"{module}.{node.name} names no version"
            )


# ---- Private methods that upstream libraries call on this package's classes ----------

TUNER = [module for module in MODULES if module.startswith(("tuner.", "core."))]


def load(module: str) -> Any:
    return importlib.import_module(f"moslora.{module.removesuffix('.__init__')}")


def own_classes() -> Iterator[type]:
    for module in TUNER:
        for _, member in inspect.getmembers(load(module), inspect.isclass):
            if member.__module__ == f"moslora.{module}" and not issubclass(member, enum.Enum | Function):
                yield member


def is_own(kind: type) -> bool:
    return kind.__module__.startswith("moslora.")


def test_overridden_private_methods_are_in_the_table() -> None:
    known = {name for methods in hooks.OVERRIDDEN.values() for name in methods}
    overridden = set()
    for kind in own_classes():
        for name, value in vars(kind).items():
            is_method = callable(value) or isinstance(value, property | classmethod | staticmethod)
            theirs = [base for base in kind.__mro__[1:] if not is_own(base) and name in vars(base)]
            if is_private(name) and is_method and theirs:
                overridden.add(name)
    assert overridden <= known, sorted(overridden - known)


def test_the_table_of_overridden_methods_has_no_entry_that_is_not_overridden() -> None:
    defined = {name for kind in own_classes() for name in vars(kind)}
    for methods in hooks.OVERRIDDEN.values():
        assert methods.keys() <= defined, sorted(methods.keys() - defined)


def test_private_names_that_are_used_are_this_packages_own_or_in_the_table() -> None:
    known = {
        name for table in (hooks.OVERRIDDEN, hooks.CALLED) for methods in table.values() for name in methods
    }
    own, used = set(), {}
    for module in TUNER:
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                is_set_on_self = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
                if is_set_on_self:
                    own.add(node.attr)
                used[node.attr] = f"{module}:{node.lineno}"
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    strange = {name: where for name, where in used.items() if name not in own | known}
    assert not strange, f"move to compat, or enter in compat/hooks.py: {strange}"
