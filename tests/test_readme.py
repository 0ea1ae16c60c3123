"""README is true: its Python runs as it stands there, and its tree is the tree.

A block runs in an empty folder that holds ``base-model/``, a tiny random Llama with a chat template, and in a
namespace of its own. A block that cannot run here says why on the line above: ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(
    r"(?P<above>[^\n]*)\n+```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    excused: bool


BLOCKS = [
    Block(
        language=match["language"],
        code=match["code"],
        line=README[: match.start("code")].count("\n") + 1,
        excused=bool(NOT_RUN.fullmatch(match["above"].strip())),
    )
    for match in FENCE.finditer("\n" + README)
]
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.excused]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_chat_model(tmp_path_factory.mktemp("readme") / "base-model")


@pytest.mark.skipif(not README, reason="README is not written yet")
def test_readme_shows_python_that_runs():
    assert PYTHON, "README has no ```python block that is run; the quick start belongs there"


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"line{block.line}")
def test_a_block_of_readme_runs_as_it_stands(block, base_model, tmp_path, monkeypatch):
    shutil.copytree(base_model, tmp_path / "base-model")
    monkeypatch.chdir(tmp_path)
    # The empty lines make a traceback point into README.
    code = compile("\n" * (block.line - 1) + block.code, str(ROOT / "README.md"), "exec")
    exec(code, {"__name__": "__main__"})


@pytest.mark.skipif(not README, reason="README is not written yet")
def test_the_tree_in_readme_names_every_file_of_the_package_and_no_other():
    trees = [block.code for block in BLOCKS if "src/moslora" in block.code and "├─" in block.code]
    assert len(trees) == 1, "README has one annotated tree, in a fence, with src/moslora in it"
    package = ROOT / "src" / "moslora"
    files = [
        path for path in package.rglob("*") if path.suffix in {".py", ".jinja"} and path.stem != "__init__"
    ]
    folders = [path for path in package.iterdir() if (path / "__init__.py").is_file()]
    names = [path.name.removesuffix(".py") for path in files + folders]
    missing = [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", trees[0])]
    assert not missing, f"README's tree does not name {sorted(missing)}"
    there = {path.name for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    gone = set(re.findall(r"[\w-]+\.py\b", trees[0])) - there
    assert not gone, f"README's tree names {sorted(gone)}, which are not there"


def test_a_block_is_found_with_its_line_and_its_excuse():
    text = "\n# Title\n\n<!-- not run: needs a GPU -->\n```python\nx = 1\n```\n\ntext\n\n```sh\nls\n```\n"
    found = [(m["language"], m["code"], bool(NOT_RUN.fullmatch(m["above"]))) for m in FENCE.finditer(text)]
    assert found == [("python", "x = 1\n", True), ("sh", "ls\n", False)]
    assert not NOT_RUN.fullmatch("<!-- not run:  -->"), "an excuse needs a reason"
