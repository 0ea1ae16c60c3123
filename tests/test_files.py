"""Files written whole or not at all, locks, processes, and the header of safetensors files."""

import math
import os
import re
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moslora import bounded, files
from moslora.errors import BusyError, ExistsError, MoSLoRAError

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.int64,
)


def saved(path, shapes=((2, 3), (), (0, 4), (5,)), metadata=None):
    tensors = {
        f"layer.{i}": torch.zeros(shape, dtype=DTYPES[i % len(DTYPES)]) for i, shape in enumerate(shapes)
    }
    save_file(tensors, path, metadata)
    return tensors


@given(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=len(DTYPES)))
def test_a_header_says_where_every_tensor_is(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("header") / "a.safetensors"
    tensors = saved(path, shapes, {"format": "pt"})
    header = bounded.read_header(path)
    assert header.metadata == {"format": "pt"}
    assert set(header.tensors) == set(tensors)
    with path.open("rb") as file:
        for name, where in header.tensors.items():
            assert where.shape == tuple(tensors[name].shape)
            file.seek(where.start)
            assert where.end - where.start == tensors[name].numel() * tensors[name].element_size()
            assert file.read(where.end - where.start) == bytes(where.end - where.start)


@given(data=st.data())
def test_a_header_is_refused_where_the_safetensors_library_refuses_it(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    saved(path)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    else:
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError:
        with pytest.raises(ValueError):
            bounded.read_header(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F32"', b'"F33"'),
        (b'"I8"', b'"i8"'),
        (b"[0,4]", b"[0.4]"),
        (b"[2,3]", b"[6e0]"),
        (b"[2,3]", b'["6"]'),
        (b"layer.1", b"layer.0"),
        (b"[0,24]", b"[1,24]"),
        (b'{"layer.0', b'["layer.0'),
    ],
)
def test_a_header_with_a_value_of_another_kind_is_refused(tmp_path, old, new):
    path = tmp_path / "a.safetensors"
    saved(path)
    raw = path.read_bytes()
    assert old in raw and len(old) == len(new)
    bounded.read_header(path)
    path.write_bytes(raw.replace(old, new, 1))
    with pytest.raises(ValueError):
        bounded.read_header(path)


def test_every_dtype_of_the_safetensors_library_is_known(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, [(1,)])
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"x32"', 1))
    with pytest.raises(SafetensorError) as refused, safe_open(path, framework="pt"):
        pass
    listed = re.findall(r"`(\w+)`", str(refused.value).partition("expected")[2])
    assert listed and set(listed) <= set(bounded.BITS)


def test_what_an_interrupted_block_wrote_is_removed(tmp_path):
    (tmp_path / "old").write_text("old")
    for write in (files.new_directory, files.new_file, files.replaced_file):
        out = tmp_path / ("old" if write is files.replaced_file else "new")
        with pytest.raises(KeyboardInterrupt), write(out) as part:
            (part / "half" if part.is_dir() else part).write_text("half")
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_nothing_that_exists_is_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "mine").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "directory", "link"):
        for write in (files.new_directory, files.new_file):
            with pytest.raises(ExistsError, match="exists already"), write(tmp_path / name):
                pass


def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with files.new_directory(tmp_path / "made") as folder:
            (folder / "a").touch()
        files.write_text(tmp_path / "text", "words")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == 0o640


def test_a_lock_is_refused_while_another_process_holds_it_and_ends_with_that_process(tmp_path):
    code = (
        "import sys, pathlib; from moslora.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match="Another process"), files.locked(tmp_path, wait=False):
        pass
    started = files.process_start(holder.pid)
    assert files.is_running(holder.pid, started)
    assert not files.is_running(holder.pid, started - 60), "an id that was used again"
    holder.kill()
    holder.communicate()
    assert not files.is_running(holder.pid, started)
    with files.locked(tmp_path, wait=False):
        pass


def test_an_error_is_caught_by_the_common_base_and_by_the_built_in_one(tmp_path):
    from moslora import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), MoSLoRAError)
        assert getattr(errors, name).exit_code in (1, 2)
    with pytest.raises(FileExistsError), files.new_file(tmp_path):
        pass
    assert math.isfinite(files.process_start(os.getpid()))
