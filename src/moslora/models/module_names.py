"""The two names of a base's tensors: in memory, where adapters are put, and on disk, where merges write.

Names in memory are what PEFT's adapters go by, and they moved between versions of transformers, most of all in
vision-language models; names on disk stayed. The conversion between them is transformers' own, asked of the model's
class on the meta device. Where the class is not in transformers, the names on disk are all that is known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moslora.errors import ModelError
from moslora.wording import first_line

if TYPE_CHECKING:
    from pathlib import Path

    from moslora.models.shards import StoredWeights

__all__ = ["PLAIN", "ModuleNames", "NamedTensor", "class_of", "read_names"]

# Model types whose names in memory have always been the names on disk (tests/test_module_names.py asks transformers),
# all of them "model.…" and "lm_head". Where an adapter's modules are all on disk too, transformers is not imported.
PLAIN = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "granite", "olmo2", "smollm3"}
)

# Which class loads a base for an adapter of a task, where the base's own class is of another.
CLASS_OF_TASK = {
    "SEQ_CLS": ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("ForTokenClassification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("Model", "AutoModel"),
}


@dataclass(frozen=True)
class NamedTensor:
    """One tensor of a base in memory.

    Attributes:
        shape: In memory; None where it is not known.
        stored: Its names on disk; several where it is put together of them, none where it is not stored (a tied head,
            or a head that a task adds).
        is_converted: Whether its values on disk are others: several tensors put together, one taken apart, another
            order.
        is_transposed: Whether it is a weight of GPT-2's Conv1D, ``(in, out)``.
    """

    shape: tuple[int, ...] | None
    stored: tuple[str, ...] = ()
    is_converted: bool = False
    is_transposed: bool = False


@dataclass(frozen=True)
class ModuleNames:
    """The names of a base in memory, and what each is on disk.

    Attributes:
        tensors: By name in memory, as ``model.language_model.layers.0.self_attn.q_proj.weight``.
        modules: Paths of all modules in memory.
        shared: Groups of tensors that are one, as a head and an embedding.
        origin: Whose names they are, for messages.
        is_of_class: Whether a model's class said them; else they are those on disk.
        convert: Returns the names in memory of names on disk, of any version that transformers knows.
        build: Builds the model on the meta device; None where its class is not in transformers.
    """

    tensors: Mapping[str, NamedTensor]
    modules: frozenset[str]
    shared: tuple[frozenset[str], ...]
    origin: str
    is_of_class: bool
    convert: Callable[[Iterable[str]], Mapping[str, str]] = field(repr=False, default=lambda _: {})
    build: Callable[[], Any] | None = field(repr=False, default=None)

    def weight(self, module: str) -> NamedTensor | None:
        """Return a module's weight; None if it has none.

        Args:
            module: Path in memory.
        """
        return self.tensors.get(f"{module}.weight")


def class_of(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> str | None:
    """Return the class of transformers into which an adapter's base is loaded.

    Args:
        config: The base's ``config.json``.
        adapter: The adapter's configuration.

    Returns:
        Its name; None if the base does not say.
    """
    mapping = adapter.get("auto_mapping")
    trained = mapping if isinstance(mapping, dict) else {}
    own = trained.get("base_model_class")
    if isinstance(own, str) and str(trained.get("parent_library", "")).startswith("transformers."):
        return own
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    task = adapter.get("task_type")
    ending, auto = CLASS_OF_TASK.get(task if isinstance(task, str) else "", ("", ""))
    return auto if auto and not (architecture or "").endswith(ending) else architecture


def read_names(
    folder: Path,
    config: Mapping[str, Any],
    weights: StoredWeights | None,
    adapter: Mapping[str, Any],
    wanted: Iterable[str],
) -> ModuleNames:
    """Read the names of a base.

    Args:
        folder: That holds its ``config.json``.
        config: What that says.
        weights: Its weights on disk; None where there are none.
        adapter: Configuration of the adapter that is held against it.
        wanted: Paths of the adapter's modules. Where they are on disk and the model type is one of ``PLAIN``,
            transformers is not asked.

    Returns:
        The names.

    Raises:
        ModelError: If neither the class nor the weights say any.
    """
    name = class_of(config, adapter)
    stored = {} if weights is None else weights.table
    build = functools.partial(_skeleton, folder, name)
    if weights is not None and _is_plain(config, name, stored, wanted):
        return replace(_from_disk(weights, f"{name}, whose names are those on disk"), build=build)
    try:
        model = build()
    except Exception as error:  # whatever a damaged or foreign configuration raises
        if weights is None:
            raise ModelError(f"The modules of {folder} cannot be told: {first_line(error)}") from error
        return _from_disk(weights, f"the names on disk ({first_line(error)})")
    return replace(_from_class(model, weights), build=build)


def _is_plain(
    config: Mapping[str, Any], name: str | None, stored: Iterable[str], wanted: Iterable[str]
) -> bool:
    if config.get("model_type") not in PLAIN or not (name or "").endswith("ForCausalLM"):
        return False
    table = set(stored)
    return all(
        f"{module}.weight" in table and (module == "lm_head" or module.startswith("model."))
        for module in wanted
    )


def _skeleton(folder: Path, name: str | None) -> Any:
    """Build the class on the meta device; a model's own code is not run."""
    if name is None:
        raise ModelError("its config.json names no architecture.")
    import torch
    import transformers

    from moslora.models.loading import quiet_transformers

    kind = getattr(transformers, name, None)
    if kind is None:
        raise ModelError(f"its class {name} is not in transformers.")
    with quiet_transformers(), torch.device("meta"):
        own = transformers.AutoConfig.from_pretrained(folder)
        model = kind.from_config(own) if name.startswith("AutoModel") else kind(own)
    model.tie_weights()
    return model


def _from_class(model: Any, weights: StoredWeights | None) -> ModuleNames:
    from transformers.pytorch_utils import Conv1D

    from moslora.compat.checkpoint_names import names_in_memory

    state = model.state_dict(keep_vars=True)
    table = {} if weights is None else weights.table
    places: dict[str, list[str]] = {}
    converted: set[str] = set()
    for key, (names, is_converted) in names_in_memory(model, table).items():
        for name in names:
            places.setdefault(name, []).append(key)
        converted.update(names if is_converted else ())
    turned = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)}
    is_packed = weights is not None and weights.quantization is not None
    tensors: dict[str, NamedTensor] = {}
    groups: dict[int, set[str]] = {}
    for name, tensor in state.items():
        stored = tuple(places.get(name, ()))
        is_converted = name in converted or len(stored) > 1
        # What is on disk is what is loaded: a configuration may be edited, and the files' shapes are the truth.
        whole = len(stored) == 1 and not is_converted and not is_packed
        shape = table[stored[0]].shape if whole else tuple(tensor.shape)
        tensors[name] = NamedTensor(shape, stored, is_converted, name in turned)
        groups.setdefault(id(tensor), set()).add(name)

    def convert(keys: Iterable[str]) -> dict[str, str]:
        return {key: names[0] for key, (names, is_one) in names_in_memory(model, keys).items() if not is_one}

    return ModuleNames(
        tensors,
        frozenset(path for path, _ in model.named_modules()),
        tuple(frozenset(group) for group in groups.values() if len(group) > 1),
        f"{type(model).__name__} of the installed transformers",
        True,
        convert,
    )


def _from_disk(weights: StoredWeights, origin: str) -> ModuleNames:
    from moslora.models.shards import EMBEDDINGS, HEADS

    is_packed = weights.quantization is not None
    tensors = {
        name: NamedTensor(None if is_packed else stored.shape, (name,))
        for name, stored in weights.table.items()
    }
    ends = [name for name in tensors if name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS]
    heads = [name for name in tensors if name.removesuffix(".weight").rpartition(".")[2] in HEADS]
    shared: tuple[frozenset[str], ...] = ()
    if len(ends) == 1 and weights.is_tied(ends[0].removesuffix(".weight")):
        if not heads:  # not stored a second time
            heads = ["lm_head.weight"]
            tensors[heads[0]] = NamedTensor(tensors[ends[0]].shape)
        shared = (frozenset((*ends, *heads)),)
    modules = {name.rpartition(".")[0] for name in tensors}
    for module in list(modules):
        while module := module.rpartition(".")[0]:
            modules.add(module)
    return ModuleNames(tensors, frozenset(modules), shared, origin, False)
