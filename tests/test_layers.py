"""Import directions: a module stands on a floor, imports from it or from below, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "moslora"

# Package, root module or single module → its floor, and what it may import when it is imported: everything slower
# belongs inside the function that needs it. A new package is entered here and in README's tree.
YAML = {"pydantic", "pydantic_core", "yaml"}
FLOORS: dict[str, tuple[int, set[str]]] = {
    "errors": (0, set()),
    "wording": (0, set()),
    "files": (0, set()),
    "patterns": (0, set()),
    "bounded": (0, set()),
    "batching": (0, set()),
    "versions": (0, set()),
    "distributed": (0, set()),
    "terminal": (0, set()),
    "failures": (0, set()),
    "display": (0, set()),
    "core": (0, {"torch"}),
    "functional": (0, set()),  # short names of core's
    "ops": (0, set()),
    "kernels": (0, set()),
    "models": (1, set()),
    "adapters": (1, {"torch", "safetensors"}),
    "tuner": (2, {"torch", "safetensors", "peft", "transformers"}),
    "compat.torch": (0, {"torch"}),
    "compat.telemetry": (0, set()),
    "compat.accelerate": (0, set()),
    "compat.deepspeed": (0, set()),  # these import nothing when they are imported
    "compat.diffusers_loading": (0, set()),
    "compat.gguf_loading": (0, set()),
    "compat.checkpoint_names": (0, set()),
    "compat": (2, {"torch", "safetensors", "peft", "transformers"}),
    "recipe": (3, YAML),
    "data": (3, set()),
    "metrics": (3, set()),
    "tasks": (4, YAML),
    "training": (5, YAML | {"rich"}),
    "evaluation": (5, YAML | {"rich"}),
    "advice": (5, YAML | {"rich"}),
    "conversation": (5, YAML | {"rich"}),
    "comparison": (5, YAML | {"rich"}),
    "memory": (5, YAML | {"rich"}),
    "reports": (5, YAML | {"rich"}),
    "api": (6, YAML),
    "studio": (6, YAML | {"gradio"}),
    "__init__": (6, set()),  # nothing below imports the root
    "cli": (6, YAML | {"rich", "typer"}),
    "__main__": (6, set()),
}
# Single modules that may import more.
ALSO = {
    # These are imported inside functions only.
    "tasks.image.autoencoders": {"torch"},
    "tasks.image.denoising": {"torch"},
    "training.callbacks": {"transformers"},
    "comparison.junction": {"torch"},
    "tasks.text.trainer": {"trl"},
    "tasks.classification.trainer": {"transformers"},
    "tasks.reward.trainer": {"trl"},
    "recipe.classifier_arguments": {"transformers"},
    "tasks.image.latents": {"torch"},
    "tasks.image.noise": {"torch"},
    "tasks.image.trainer": {"torch"},
    "core.kernels.programs": {"triton"},
    "core.kernels.launching": {"triton"},
    # Scripts, which a process of their own runs and nothing imports.
    "training.reload_proof.stock_peft": {"torch", "safetensors", "peft", "transformers"},
    "training.reload_proof.stock_diffusers": {"torch", "safetensors", "peft", "diffusers"},
}
ONLY_IN = {
    "triton": {"core.kernels.programs", "core.kernels.launching"},
    "gradio": {
        *(f"studio.views.{name}" for name in ("runs", "train", "compare", "adapters", "chat")),
        "studio.page",
        "studio.serving",
    },
}
# An adapter at rest needs neither PEFT nor transformers nor diffusers, but where a proof asks another project's loader,
# or a base is read by its own class. File → the functions that may import them, and what for.
AT_REST = {
    "adapters.formats.lora": {
        "read_with_peft"
    },  # the proof of plain LoRA: PEFT's reader of its configuration
    "adapters.formats.skeleton": {
        "load_with_peft",
        "filled_factors",
        "misfits_by_peft",
    },  # the same proof: PEFT's loader
    "adapters.formats.diffusers": {"read_with_diffusers"},  # the proofs of image formats: diffusers' loader
    "adapters.formats.kohya": {"read_with_diffusers"},
    "adapters.formats.original": {"_understood"},
    "adapters.formats.through_diffusers": {"understood"},
    "adapters.export": {"base_config"},  # GGUF takes the base's configuration, with its class's defaults
}
NOT_AT_REST = {"peft", "transformers", "diffusers"}

MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def place_of(module: str) -> tuple[int | None, set[str]]:
    """Return a module's floor and what it may import: its own entry, or its package's."""
    none: tuple[int | None, set[str]] = (None, set())
    return FLOORS.get(module) or FLOORS.get(module.split(".")[0]) or none


def floor_of(module: str) -> int | None:
    return place_of(module)[0]


def imports(node: ast.AST, at_import_time: bool = True) -> Iterator[tuple[str, list[str], bool, int]]:
    """Yield dotted module, names taken from it, whether it happens on import, and the line."""
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, [], at_import_time, child.lineno
        elif isinstance(child, ast.ImportFrom):
            yield (
                "." * child.level + (child.module or ""),
                [a.name for a in child.names],
                at_import_time,
                child.lineno,
            )
        yield from imports(child, at_import_time and not inside and not typing_only)


def own_modules(dotted: str, names: list[str]) -> set[str]:
    """Return which of our files ``from dotted import names`` reads: submodules where there are any."""
    stem = dotted.removeprefix("moslora").removeprefix(".")
    submodules = {f"{stem}.{name}".removeprefix(".") for name in names}
    found = {m for s in submodules for m in (s, f"{s}.__init__") if m in MODULES}
    rest = len(found) < len(names) or not names
    return found | {m for m in (stem, f"{stem}.__init__".removeprefix(".")) if m in MODULES and rest}


def test_every_module_has_a_floor():
    homeless = sorted(module for module in MODULES if floor_of(module) is None)
    assert not homeless, f"add {homeless} to FLOORS in tests/test_layers.py and to the tree in README.md"


def test_no_file_is_longer_than_a_head_can_hold():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert not {module: length for module, length in lengths.items() if length > 500}


def test_no_arrow_points_up_and_none_in_a_circle():
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, path in MODULES.items():
        for dotted, names, _, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(PACKAGE.parent)}:{line}"
            assert not dotted.startswith("."), f"{where}: write imports in full, from moslora…"
            if dotted.split(".")[0] != "moslora":
                continue
            for target in own_modules(dotted, names):
                upward = f"{where}: floor {floor_of(module)} imports {target} of floor {floor_of(target)}"
                assert (floor_of(target) or 0) <= (floor_of(module) or 0), upward
                graph[module].add(target)
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"an import cycle: {' ← '.join(error.args[1])}")


def test_each_floor_imports_only_what_it_may_when_it_is_imported():
    for module, path in MODULES.items():
        allowed = place_of(module)[1] | ALSO.get(module, set())
        for dotted, _, at_import_time, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
            package, where = dotted.split(".")[0], f"{path.relative_to(PACKAGE.parent)}:{line}"
            if package in sys.stdlib_module_names or package == "moslora":
                continue
            assert module in ONLY_IN.get(package, {module}), (
                f"{where}: only {ONLY_IN[package]} may import {package}"
            )
            allowed_here = not at_import_time or package in allowed
            assert allowed_here, f"{where}: import {package} inside the function that needs it"


def test_an_adapter_at_rest_imports_other_loaders_only_in_the_functions_of_the_table():
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if module.split(".")[0] != "adapters":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            for dotted, *_ in imports(ast.Module([node], [])):
                if dotted.split(".")[0] in NOT_AT_REST:
                    found.setdefault(module, set()).add(getattr(node, "name", "the module"))
    assert found == AT_REST


def test_importing_the_package_leaves_the_trainers_and_plots_alone():
    code = "import sys, moslora; print(*({'trl', 'datasets', 'matplotlib', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


SCRIPTS = [path for folder in ("benchmarks", "recipes") for path in (ROOT / folder).rglob("*.py")]


def imported_by_scripts() -> Iterator[tuple[str, str, list[str]]]:
    """Yield where, the module and the names that scripts outside the package, and the Makefile, import from it."""
    for path in SCRIPTS:
        for dotted, names, _, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if dotted.split(".")[0] == "moslora":
                yield f"{path.relative_to(ROOT)}:{line}", dotted, names
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for match in re.finditer(r"from (moslora[\w.]*) import ([\w, ]+)", makefile):
        yield "Makefile", match[1], [name.strip() for name in match[2].split(",")]


def test_scripts_and_the_makefile_import_what_is_there():
    found = list(imported_by_scripts())
    assert any(where == "Makefile" for where, _, _ in found) and len(found) > 20
    for where, dotted, names in found:
        module = importlib.import_module(dotted)
        for name in names:
            is_there = hasattr(module, name) or importlib.util.find_spec(f"{dotted}.{name}")
            assert is_there, f"{where}: {dotted} has no {name}"
