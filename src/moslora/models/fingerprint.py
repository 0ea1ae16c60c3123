"""Which model it is exactly: the hashes of its files, or the commit of the hub."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from moslora.bounded import read_header
from moslora.errors import ModelError
from moslora.files import sha256
from moslora.models.names import ModelSource

__all__ = ["HASH_LIMIT", "fingerprint", "header_sha256", "hub_commit"]

HASH_LIMIT = 4 << 30  # bytes; more than this is not read just to be named


def fingerprint(source: ModelSource) -> dict[str, Any]:
    """Identify a model by its content.

    Args:
        source: From ``resolve_model`` or ``materialize``. A hub id must have been loaded before.

    Returns:
        ``kind``, ``name`` and ``method``. With ``"commit"``: the hub's ``commit``, None if it is not known.
        With ``"sha256"``: ``files``, the hash of every file of configuration and weights. With
        ``"sha256-of-headers"``, for weights beyond 4 GiB: the hash of each file's size and first part, which
        in safetensors names every tensor.

    Raises:
        ModelError: If a file cannot be read.
    """
    about: dict[str, Any] = {"kind": source.kind, "name": source.name}
    if source.kind == "hub":
        return {**about, "method": "commit", "commit": hub_commit(source)}
    folder = Path(source.path)
    files = [source.gguf_file] if source.gguf_file else sorted(folder.glob("*.safetensors"))
    try:
        whole = sum(file.stat().st_size for file in files) <= HASH_LIMIT
        hashes = {file.name: sha256(file) if whole else header_sha256(file) for file in files}
        if source.gguf_file is None:
            hashes["config.json"] = sha256(folder / "config.json")
    except OSError as error:
        raise ModelError(f"{source.name} cannot be read: {error}.") from error
    return {**about, "method": "sha256" if whole else "sha256-of-headers", "files": hashes}


def hub_commit(source: ModelSource, file: str = "config.json") -> str | None:
    """Return the commit of a hub id that has been loaded before; None if it is not known.

    Args:
        source: Of kind ``"hub"``.
        file: A file that every model of its kind has.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source.path, file, revision=source.revision)
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", config) if isinstance(config, str) else None
    return found.group(1) if found else None


def header_sha256(path: Path) -> str:
    """Hash the size of a file and its header: the names, dtypes, shapes and places of its tensors.

    Args:
        path: A safetensors file; or a GGUF file, of which the first MiB is hashed.

    Returns:
        Hexadecimal digits.

    Raises:
        ModelError: If a safetensors file is damaged.
        OSError: If the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(8)
        if head[:4] == b"GGUF":
            length = 1 << 20
        else:
            try:
                length = read_header(path).length
            except ValueError as error:
                raise ModelError(f"{path} is damaged or cut off: {error}. Download it again.") from error
        head += file.read(length)
    return hashlib.sha256(head + str(path.stat().st_size).encode()).hexdigest()
