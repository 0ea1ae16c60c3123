"""A disk that fills up under every verb, and errors of other libraries: a message with the way on, a true status."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

import moslora.adapters.export
import moslora.training.run
import tiny
from moslora import DiskFullError, MoSLoRAConfig
from moslora.adapters.export import export_adapter
from moslora.cli import app
from moslora.failures import raise_if_full
from moslora.training.run_directory import RunDirectory

# Runs commands under a limit on the size of every file that they write, which fails as a full disk does, in an OSError.
# A process of its own, so that the limit meets nothing else.
LIMITED = """
import json, resource, signal, sys
from typer.testing import CliRunner
import torch, peft, transformers, gguf, trl
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
    tiny.save_chat_data(folder / "train.jsonl", 8)
    tiny.save_chat_data(folder / "heldout.jsonl", 3)
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
TRAIN = [
    *(
        "train",
        "model=base",
        "data=train.jsonl",
        "data.heldout=heldout.jsonl",
        "adapter.r=4",
        "trainer.max_steps=2",
    ),
    *("trainer.save_steps=1", "trainer.per_device_train_batch_size=4", "task.generate_examples=0"),
]
# Bytes that a file may have, and at which stage a run meets them; None where nothing of it can be kept.
STAGES = {0: None, 600: None, 9000: "preparing to train", 60_000: "training"}


def under_limits(folder: Path, cases: list[tuple[int, list[str]]]) -> list[tuple[int, str]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, json.dumps(cases)],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(cases)
    for case, (_, _, raised) in zip(cases, lines, strict=True):
        assert raised is None, (case, raised)
    return [(code, output) for code, output, _ in lines]


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX")
def test_a_full_disk_ends_in_a_message_with_the_way_on_and_leaves_nothing_unfinished(sound: Path) -> None:
    before = sorted(p.name for p in sound.iterdir())
    cases = [(limit, verb) for verb in VERBS.values() for limit in (0, 100, 700)]
    trainings = [(limit, [*TRAIN, f"output=runs/{limit}"]) for limit in STAGES]
    done = under_limits(sound, cases + trainings)
    for case, (code, output) in zip(cases, done, strict=False):
        assert code == 1, (case, output)
        out = next(word for word in case[1] if word.startswith("out"))
        assert f"Error: {out} could not be written whole" in output, (case, output)
        assert "may have" in output and "ulimit -f unlimited), then do the same again" in output
    for (limit, stage), (code, output) in zip(STAGES.items(), done[len(cases) :], strict=True):
        assert code == 1 and "could not be written whole" in output, (limit, output)
        run = sound / "runs" / str(limit)
        assert run.exists() is (stage is not None)
        if stage is not None:
            record = json.loads((run / "run.json").read_text())
            assert (record["status"], record["stage"]) == ("failed", stage)
            assert f"moslora train --resume {run}" in output
    shutil.rmtree(sound / "runs")
    assert sorted(p.name for p in sound.iterdir()) == before


def test_a_full_disk_is_recognized_however_a_library_says_it(tmp_path: Path) -> None:
    for error in (
        OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a")),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("basic_ios::clear: iostream error"),
    ):
        with pytest.raises(DiskFullError, match=r"disk is full: .*B of .*B are free.*then continue\."):
            raise_if_full(error, tmp_path, "continue.")
        outer = KeyError("outer")
        outer.__context__ = error
        with pytest.raises(DiskFullError):
            raise_if_full(outer, tmp_path, "continue.")
    raise_if_full(ValueError("something else"), tmp_path, "continue.")


def test_a_status_is_noted_where_there_is_room_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RunDirectory, document: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for status in ("failed", "interrupted", "completed"):
        run = RunDirectory.create(tmp_path, "run")
        before, size = run.read(), run.record.stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "_write", full)
            run.end(status, error="what it was")
        assert run.read() == {**before, "status": status} and run.record.stat().st_size == size
        run.end("failed", error="what it was")  # there is room again
        assert run.read()["error"] == "what it was"


# --- Other libraries' errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "way"),
    [
        (ValueError("range() arg 3 must not be zero"), "--debug"),
        (
            IndexError("index out of range in self"),
            "the tokenizer belongs to another model, or a row is longer",
        ),
        (ValueError("cannot reshape array of size 3 into shape (2,)"), "--debug"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "per_device_train_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "per_device_train_batch_size"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "Check whose"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (KeyError("x"), "--debug"),
    ],
)
def test_an_error_of_another_library_comes_with_what_was_done_and_what_to_do(
    error: Exception, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        exec("raise error", {"__name__": "numpy", "error": error})

    monkeypatch.setattr(moslora.adapters.export, "export_adapter", fail)
    done = CliRunner().invoke(app, ["export", "a", "b"])
    assert done.exit_code in (1, 2)
    assert re.search(
        rf"(?s)Error: {type(error).__name__}: .+\nWhile exporting an adapter\..*{way}", done.output
    )
    traced = CliRunner().invoke(app, ["export", "a", "b", "--debug"])
    assert traced.exit_code == done.exit_code and "Traceback" in traced.output
    error.__notes__ = []
    with pytest.raises(type(error)) as raised:
        moslora.export("a", "b")
    assert "While exporting an adapter." in raised.value.__notes__[0]


def test_an_error_of_ours_comes_alone() -> None:
    done = CliRunner().invoke(app, ["export", "no-such", "b"])
    assert done.exit_code == 2 and "While" not in done.output


def test_the_error_of_a_run_names_its_stage_and_how_it_goes_on(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        exec("raise IndexError('index out of range in self')", {"__name__": "torch"})

    monkeypatch.chdir(sound)
    monkeypatch.setattr(moslora.training.run, "fit", fail)
    done = CliRunner().invoke(app, [*TRAIN, f"output={tmp_path}/run"])
    assert (
        done.exit_code == 1 and "Error: IndexError: index out of range in self\nWhile the run" in done.output
    )
    assert f"Then continue from where it was: moslora train --resume {tmp_path}/run" in done.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
