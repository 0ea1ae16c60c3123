"""GGUF adapters, as llama.cpp reads them with ``--lora``.

A module's tensors are ``NAME.weight.lora_a`` ``(r, in)`` and ``NAME.weight.lora_b`` ``(out, r)``, with llama.cpp's
names of tensors; its scale is alpha / r, or 1 where the file has no alpha. The scale is inside B here, so alpha is
written as r, and left out where ranks differ.

llama.cpp lays the rows of a Llama's query and key projections out for another form of the rotary embedding. Its
converter moves the rows of W; those of B must move alike, or the adapter runs and is wrong. So only architectures are
written whose mapping was held against llama.cpp itself (``tests/test_gguf.py``).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats.lora import flatten
from moslora.errors import AdapterError, MissingPackageError

__all__ = ["ARCHITECTURES", "read_with_gguf", "write"]


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp holds a model.

    Attributes:
        name: Its name in ``gguf.MODEL_ARCH``.
        moves_rows: Whether the rows of q_proj and k_proj are laid out for llama.cpp's rotary embedding.
    """

    name: str
    moves_rows: bool


# By what a model's config.json says in "architectures".
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("LLAMA", True),
    "MistralForCausalLM": Architecture("LLAMA", True),
    "Qwen2ForCausalLM": Architecture("QWEN2", False),
    "Qwen3ForCausalLM": Architecture("QWEN3", False),
}


def _need_gguf() -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError("Writing GGUF needs the package gguf: pip install 'moslora[gguf]'.")
    import gguf

    return gguf


def _move_rows(B: Tensor, heads: int, back: bool = False) -> Tensor:
    """Turn each head's rows from two halves to pairs, as llama.cpp's rotary embedding takes them, or back."""
    half = B.shape[0] // heads // 2
    shape = (heads, half, 2) if back else (heads, 2, half)
    return B.reshape(*shape, -1).swapaxes(1, 2).reshape(B.shape).contiguous()


@dataclass(frozen=True)
class _Target:
    """Where a module goes: its name in llama.cpp, and how many heads' rows move (0: none)."""

    name: str
    heads: int


def _targets(adapter: Adapter, base: Mapping[str, Any]) -> tuple[str, dict[str, _Target]]:
    """Map modules to llama.cpp's tensors; refuse what it would not find or would misread."""
    gguf = _need_gguf()
    kinds = base.get("architectures") or []
    architecture = next((ARCHITECTURES[kind] for kind in kinds if kind in ARCHITECTURES), None)
    if architecture is None:
        raise AdapterError(
            f"The base is a {' or '.join(map(str, kinds)) or 'model without a name'}, whose mapping to llama.cpp "
            f"is not verified; verified are {', '.join(sorted(ARCHITECTURES))}. Merge the adapter into its base "
            "(moslora merge) and convert the whole model with llama.cpp's convert_hf_to_gguf.py."
        )
    for key in adapter.extra:
        raise AdapterError(
            f"The adapter also has {key}, which is not a factor (a bias, or of modules_to_save); llama.cpp's adapters "
            "have no place for it. Merge the adapter into its base (moslora merge BASE ADAPTER OUT), and "
            "convert the whole model with "
            "llama.cpp's convert_hf_to_gguf.py."
        )
    arch = getattr(gguf.MODEL_ARCH, architecture.name)
    layers, attention_heads = base.get("num_hidden_layers"), base.get("num_attention_heads")
    heads: dict[str, Any] = {
        "q_proj": attention_heads,
        "k_proj": base.get("num_key_value_heads") or attention_heads,
    }
    for name, number in {"num_hidden_layers": layers, **heads}.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 < number < 10**5:
            raise AdapterError(
                f"The base's configuration gives {number!r} for {name.replace('_proj', ' heads')}; name the base that "
                "the adapter was trained on."
            )
    names = gguf.get_tensor_name_map(arch, layers)
    tied = bool(base.get("tie_word_embeddings", False))
    targets: dict[str, _Target] = {}
    for path, factors in adapter.modules.items():
        name = names.get_name(path)
        if name is None or factors.form.kind == "conv":
            raise AdapterError(
                f"{path} has no name in llama.cpp's {architecture.name}, so it would not be found. Merge the "
                "adapter into its "
                "base (moslora merge), and convert the whole model."
            )
        if name in ("token_embd", "output") and tied:
            raise AdapterError(
                f"{path} is adapted, and the base ties its embedding to its head. llama.cpp has one tensor for both: "
                "it refuses an adapted head, and ends the process on an adapted embedding. Untie the base "
                "(tie_word_embeddings=False, the embedding copied into the head), merge the adapter into that "
                "(moslora merge), "
                "and convert the whole model."
            )
        moving = heads.get(path.rpartition(".")[2], 0) if architecture.moves_rows else 0
        if moving and factors.B.shape[0] % (2 * moving):
            raise AdapterError(
                f"{path} has {factors.B.shape[0]} outputs, which are no {moving} heads of the base."
            )
        targets[path] = _Target(f"{name}.weight", moving)
    if len({target.name for target in targets.values()}) < len(targets):
        raise AdapterError("Two modules have one name in llama.cpp, so one of them would be lost.")
    return gguf.MODEL_ARCH_NAMES[arch], targets


def write(
    adapter: Adapter, path: Path, dtype: torch.dtype = torch.float32, *, base: Mapping[str, Any]
) -> None:
    """Write a GGUF adapter, folded.

    Args:
        adapter: Of a language model.
        path: The file.
        dtype: Of its tensors.
        base: The base's ``config.json``.

    Raises:
        AdapterError: If the base's architecture is not verified, or llama.cpp would refuse or misread the file.
        MissingPackageError: If the package gguf is missing.
        OSError: If it cannot be written.
    """
    gguf = _need_gguf()
    adapter.refuse_magnitudes("A GGUF file has no place for it")
    adapter.refuse_biases("A GGUF file has no place for it")
    plain = flatten(adapter)
    name, targets = _targets(plain, base)
    writer = gguf.GGUFWriter(None, name)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    ranks = {factors.r for factors in plain.modules.values()}
    if len(ranks) == 1:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()))
    kind = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }[dtype]
    for module in sorted(plain.modules):
        factors, target = plain.modules[module], targets[module]
        # llama.cpp looks tokens up in the rows of an embedding's A.
        A = factors.A.T if factors.form.kind == "embedding" else factors.A
        B = _move_rows(factors.B, target.heads) if target.heads else factors.B
        for suffix, tensor in (("lora_a", A), ("lora_b", B)):
            values = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
            writer.add_tensor(f"{target.name}.{suffix}", values, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_with_gguf(path: Path, like: Adapter, *, base: Mapping[str, Any]) -> tuple[Adapter, str]:
    """Read a GGUF adapter with gguf's own reader, names and rows turned back.

    Args:
        path: The file.
        like: What was written.
        base: The base's ``config.json``.

    Returns:
        What the file says, with the paths of ``like``; and the name of the reader.

    Raises:
        AdapterError: If a tensor is missing or left over, or the file is not an adapter.
    """
    gguf = _need_gguf()
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    name, targets = _targets(like, base)
    said = (fields.get("general.architecture"), fields.get("general.type"), fields.get("adapter.type"))
    if said != (name, "adapter", "lora"):
        raise AdapterError(f"{path} says it is {said}, not an adapter of {name}.")
    tensors = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors
    }
    modules: dict[str, Factors] = {}
    for module, target in targets.items():
        try:
            A, B = (tensors.pop(f"{target.name}.{suffix}") for suffix in ("lora_a", "lora_b"))
        except KeyError as error:
            raise AdapterError(f"{path} lacks {error}.") from error
        form = like.modules[module].form
        A = A.T.contiguous() if form.kind == "embedding" else A
        B = _move_rows(B, target.heads, back=True) if target.heads else B
        alpha = fields.get("adapter.lora.alpha")
        scale = 1.0 if not alpha else float(alpha) / A.shape[0]
        modules[module] = Factors(A, torch.eye(A.shape[0]), B, scale, form)
    if tensors:
        raise AdapterError(f"{path} also holds {sorted(tensors)[:3]}.")
    return Adapter(modules, like.config), f"gguf {importlib.metadata.version('gguf')}"
