"""The weights of a base model on disk: the shard and the bytes of every tensor. Nothing is loaded in advance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.bounded import read_header
from moslora.errors import ModelError
from moslora.models.gguf import materialize
from moslora.models.names import ModelSource, read_json, resolve_model

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DTYPES", "EMBEDDINGS", "HEADS", "INDEX", "Stored", "StoredWeights", "open_weights"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
HEADS = ("lm_head", "embed_out", "output")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: its shard, dtype, shape, and first byte in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class StoredWeights:
    """A base model's weights on disk.

    Attributes:
        folder: The directory.
        config: The model's ``config.json``.
        shards: Names of the files.
        table: Where each tensor is, by its name.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[str, ...]
    table: Mapping[str, Stored]

    @property
    def quantization(self) -> str | None:
        """What quantized the weights; None if nothing did."""
        about = self.config.get("quantization_config")
        if not about:
            return None
        return str(about.get("quant_method", "unknown")) if isinstance(about, dict) else "unknown"

    def is_tied(self, module: str) -> bool:
        """Tell whether a module is an embedding or a head that share one weight.

        Args:
            module: Path in the base model.
        """
        if module.rpartition(".")[2] not in HEADS + EMBEDDINGS:
            return False
        return bool(self.config.get("tie_word_embeddings", not any("lm_head" in name for name in self.table)))

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: A key of ``table``.

        Returns:
            The tensor, in its own dtype.

        Raises:
            ModelError: If its dtype is not one of ``DTYPES``.
        """
        import torch

        stored = self.table[name]
        if stored.dtype not in DTYPES:
            raise ModelError(f"{name} is stored as {stored.dtype}; supported: {', '.join(DTYPES)}.")
        dtype: torch.dtype = getattr(torch, DTYPES[stored.dtype])
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=dtype)
        with (self.folder / stored.shard).open("rb") as file:
            file.seek(stored.start)
            data = bytearray(file.read(math.prod(stored.shape) * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).view(stored.shape)


def open_weights(base: str | Path, say: Callable[[str], None] = lambda _: None) -> StoredWeights:
    """Find where a base model's weights are on disk.

    Args:
        base: Folder, hub id, GGUF file (dequantized to float32 on the way) or packaged model.
        say: Receives a line before long work.

    Returns:
        Its weights; no tensor is read.

    Raises:
        ModelError: If it cannot be read.
    """
    folder = _folder(resolve_model(str(base)), say)
    shards = _shards(folder)
    table = {name: stored for shard in shards for name, stored in _stored(folder / shard).items()}
    return StoredWeights(folder, read_json(folder / "config.json"), tuple(shards), table)


def _folder(source: ModelSource, say: Callable[[str], None]) -> Path:
    """Find the folder that holds the base's weights."""
    if source.kind != "hub":
        return Path(materialize(source, "float32", say=say).path)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=wanted))


def _shards(folder: Path) -> list[str]:
    shards = [SINGLE]
    if (folder / INDEX).is_file():  # validated by resolve_model
        shards = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    for name in shards:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(
                f"{folder} lacks {name}. Merging reads safetensors; load and save the base with transformers if "
                "it has its weights in another form, or complete the download."
            )
    return shards


def _stored(path: Path) -> dict[str, Stored]:
    """Return where a shard's tensors are."""
    try:
        header = read_header(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged or cut off: {error}. Download the base again.") from error
    return {
        name: Stored(path.name, tensor.dtype, tensor.shape, tensor.start)
        for name, tensor in header.tensors.items()
    }
