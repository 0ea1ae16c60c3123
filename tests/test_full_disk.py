"""A disk that fills up, after so many bytes, under every verb that writes: a message, and nothing left at OUT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.export import export_adapter

# Runs commands under a limit on the size of every file that they write, which fails as a full disk does, in an OSError.
# A process of its own, so that the limit meets nothing else.
LIMITED = """
import json, resource, signal, sys
from typer.testing import CliRunner
import torch, peft, transformers, gguf
import moslora.adapters.export, moslora.adapters.merge, moslora.adapters.combine, moslora.adapters.inspection
import moslora.training.run
from moslora.cli import app
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit, arguments in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    done = CliRunner().invoke(app, arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    raised = None if isinstance(done.exception, SystemExit | None) else repr(done.exception)
    print(json.dumps([done.exit_code, done.output, raised]))
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    tiny.save_chat_model(folder / "base")
    torch.manual_seed(1)
    config = MoSLoRAConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.llama(vocab_size=259, max_position_embeddings=256), config)
    model.save_pretrained(folder / "native")
    export_adapter(folder / "native", folder / "lora")
    return folder


VERBS = {
    "export": ["export", "native", "out"],
    "export to gguf": ["export", "native", "out.gguf", "--to", "gguf", "--base", "base"],
    "import": ["import", "lora", "out"],
    "combine": ["combine", "native", "lora", "--out", "out"],
    "merge": ["merge", "base", "native", "out"],
    "inspect": ["inspect", "native", "--html", "out.html"],
}


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX")
def test_a_full_disk_ends_in_a_message_and_leaves_nothing(sound: Path) -> None:
    before = sorted(p.name for p in sound.iterdir())
    cases = [(limit, verb) for verb in VERBS.values() for limit in (0, 100, 700, 3000)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, json.dumps(cases)],
        cwd=sound, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        code, output, raised = json.loads(line)
        assert raised is None, (case, raised)
        assert code in (1, 2) and "Error: " in output, (case, output)
    assert sorted(p.name for p in sound.iterdir()) == before
