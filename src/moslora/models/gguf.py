"""A GGUF model as an ordinary folder: dequantized once, kept in the cache, and read back."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moslora.errors import ModelError
from moslora.files import ABANDONED_AFTER, clear_leftovers, locked, remove, scratch, sha256
from moslora.models.loading import load_model, load_tokenizer, quiet_transformers
from moslora.models.names import PACKAGED, ModelSource, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ITEM_SIZE", "RECORD", "cache_folder", "materialize"]

RECORD = "moslora.json"  # what a folder was made of, and how large its files are
TOKENIZER_PROBES = (
    "Turn the lamp off at 7:45, please.",
    "  naïve  12345\n\n\tünïcode 🎉 <|im_start|>user\nHi<|im_end|></s>",
)
ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes per parameter


def cache_folder() -> Path:
    """Return the cache: ``$MOSLORA_CACHE``, else ``$XDG_CACHE_HOME/moslora``, else ``~/.cache/moslora``."""
    if os.environ.get("MOSLORA_CACHE"):
        return Path(os.environ["MOSLORA_CACHE"]).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "moslora"


def materialize(
    source: ModelSource,
    dtype: str = "float32",
    cache: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> ModelSource:
    """Dequantize a GGUF model once into an ordinary folder, which every other program can load by its path.

    Args:
        source: Any model. One that is not a GGUF file is returned as it is.
        dtype: A key of ``ITEM_SIZE``: what the folder's weights are stored in. ``"auto"`` is float32.
        cache: Where folders are kept; ``cache_folder()`` by default.
        say: Receives a line when something that takes long begins, and when it is done.

    Returns:
        A source of kind ``"folder"``. Its weights are bit for bit what transformers reads from the GGUF.

    Raises:
        ModelError: If the file cannot be converted, the disk is too small, or what was written is not what
            was read. Nothing is left then.
    """
    if source.gguf_file is None:
        return source
    dtype = "float32" if dtype == "auto" else dtype
    if dtype not in ITEM_SIZE:
        raise ModelError(f"dtype={dtype!r} is unknown; choose one of {', '.join(ITEM_SIZE)}.")
    say = say or (lambda _: None)
    from transformers import __version__ as version

    root = (cache or cache_folder()) / "models"
    digest = sha256(source.gguf_file)
    stem = re.sub(r"[^\w.-]+", "-", source.gguf_file.stem).lower()
    folder = (root / f"{stem}-{digest[:16]}-{dtype}-transformers-{version}").absolute()
    made = ModelSource(source.name, "folder", str(folder))
    if _is_whole(folder):
        return made
    try:
        root.mkdir(parents=True, exist_ok=True)
        clear_leftovers(root)
        for old in root.glob(".partial-*"):  # which version 0.1 called them
            if time.time() - old.stat().st_mtime > ABANDONED_AFTER:
                remove(old)
        with locked(root):  # against another process that is putting it there
            if _is_whole(folder):
                return made
            if folder.exists():
                say(f"{folder} is damaged; making it again.")
                shutil.rmtree(folder)
        size = _size_when_dequantized(source.gguf_file, dtype)
        free = shutil.disk_usage(root).free
        if free < size:
            raise ModelError(
                f"{source.name} needs {size / 1e6:.0f} MB in {root}, where {free / 1e6:.0f} MB are free. "
                "Make room, or set MOSLORA_CACHE to a larger disk."
            )
        say(f"Dequantizing {source.gguf_file.name} once to {dtype}, {size / 1e6:.0f} MB, into {folder}")
        started = time.monotonic()
        with scratch(f".{folder.name}", root) as temporary:
            _write_folder(source, dtype, temporary, digest)
            with locked(root):
                _move(temporary, folder)
    except OSError as error:
        raise ModelError(f"{source.name} could not be written to {root}: {error}.") from error
    say(f"Done in {time.monotonic() - started:.0f} s; every weight and the tokenizer read back equal")
    return made


def _is_whole(folder: Path) -> bool:
    """Whether every file of a finished folder is there with its size."""
    try:
        files = read_json(folder / RECORD)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (ModelError, OSError, KeyError, AttributeError):
        return False


def _move(temporary: Path, folder: Path) -> None:
    """Rename a finished folder into place; another process may have been first with the same."""
    try:
        temporary.replace(folder)
    except OSError:
        if not _is_whole(folder):
            raise


def _size_when_dequantized(file: Path, dtype: str) -> int:
    """Return about how many bytes the folder will have, and refuse a GGUF file that is not a whole model."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            "Reading GGUF files needs one more package. Run: pip install 'moslora[gguf]'"
        ) from error
    try:
        reader = GGUFReader(file)
        kind = reader.get_field("general.type")
        if kind is not None and kind.contents() == "adapter":
            raise ModelError(f"{file} is an adapter, not a model. Name the base model that it belongs to.")
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except ModelError:
        raise
    except Exception as error:  # the reader fails in many ways on a damaged file
        raise ModelError(f"{file} is damaged or cut off: {error}. Download it again.") from error
    if not parameters:
        raise ModelError(f"{file} holds no weights; it may be a vocabulary only.")
    # The tokenizer's files come on top.
    return parameters * ITEM_SIZE[dtype] + 16_000_000


def _write_folder(source: ModelSource, dtype: str, folder: Path, digest: str) -> None:
    """Write a dequantized model and prove it by reading it back."""
    import torch
    from transformers import __version__ as version

    model = load_model(source, dtype)
    tokenizer = load_tokenizer(source)
    expected = _digests(model)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    del model  # so that never two copies are in memory
    mode = folder.stat().st_mode & 0o666  # follows the umask, which the files of some writers do not
    for path in folder.iterdir():
        path.chmod(mode)
    # The record comes before the proof, because a finished folder is one that has it in place.
    record = {
        "source": source.gguf_file.name if source.gguf_file else source.name,
        "sha256": digest,
        "dtype": dtype,
        "transformers": version,
        "torch": torch.__version__,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    if source.name in PACKAGED:
        package = PACKAGED[source.name]
        record |= {"origin": package.origin, "licence": package.licence}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    written = ModelSource(source.name, "folder", str(folder))
    found = _digests(load_model(written, dtype))
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ModelError(
            f"{source.name} was not written as it was read: {wrong[0]} and {len(wrong) - 1} more."
        )
    again = load_tokenizer(written)
    if again.chat_template != tokenizer.chat_template:
        raise ModelError(f"{source.name} was not written as it was read: its chat template changed.")
    for probe in TOKENIZER_PROBES:
        if again(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
            raise ModelError(f"{source.name} was not written as it was read: its tokenizer splits {probe!r}.")


def _digests(model: PreTrainedModel) -> dict[str, str]:
    """Return the SHA-256 of every tensor's bytes, by name."""
    import torch

    return {
        name: hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in model.state_dict().items()
    }
