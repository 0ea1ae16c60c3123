"""Hold an adapter against a base: names as the base has them in memory, and what is missing, unexpected or misshapen.

One function for all verbs. PEFT warns of factors that are missing and says nothing of ones that fit no module, so an
adapter of other names, of another base or of an older transformers runs as the bare base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.adapters.expert_layouts import LAYOUTS, ExpertLayout
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.findings import some
from moslora.adapters.formats import experts
from moslora.adapters.formats.key_names import KEY_PREFIX
from moslora.adapters.renaming import WITHIN, named_alike, rename_modules, targets_module
from moslora.errors import AdapterError, ModelError
from moslora.models.module_names import ModuleNames, NamedTensor, read_names
from moslora.models.names import read_json, resolve_model
from moslora.models.shards import StoredWeights, open_weights
from moslora.patterns import check_patterns
from moslora.wording import nearest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fit", "fit_to_base", "fit_to_named_base", "targets_module"]

TOKENS = "trainable_tokens_delta"
CUT_ON_PURPOSE = (
    "Name the base that the adapter was trained on; or, if it was cut on purpose, narrow target_modules in its "
    "adapter_config.json to the modules that it has."
)


@dataclass(frozen=True)
class Fit:
    """An adapter held against a base.

    Attributes:
        adapter: The adapter with the base's names in memory.
        base: The base's name, for messages.
        names: The base's names.
        renamed: By path in the adapter as it was read, the base's, where they differ.
        unexpected: Modules and tensors beside the factors for which the base has no place, and why.
        misshapen: Modules and tensors of other shapes than the base's, and which.
        missing: Modules of the base that the configuration targets and that the adapter has no factors for.
        unchecked: How many shapes could not be compared (experts, quantized weights, heads that are not stored).
        new_heads: Tensors beside the factors that the base has in memory alone and does not store, as the head of a
            task, by their names in the file.
        on_disk: Where an expert is that is a module on disk and none in memory: its path in memory.
        config: The base's ``config.json``.
    """

    adapter: Adapter
    base: str
    names: ModuleNames
    renamed: Mapping[str, str]
    unexpected: Mapping[str, str]
    misshapen: Mapping[str, str]
    missing: tuple[str, ...]
    unchecked: int
    new_heads: frozenset[str] = frozenset()
    on_disk: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def faults(self) -> tuple[str, ...]:
        """What does not fit, as sentences; empty where all does."""
        found = []
        count = len(self.adapter.modules) + len(self.adapter.extra)
        if self.unexpected:
            first, reason = next(iter(self.unexpected.items()))
            found.append(
                f"{len(self.unexpected)} of {count} modules and tensors of the adapter have no place in {self.base} "
                f"({self.names.origin}), as {first}{reason}. PEFT would leave them out. Name the base that the "
                "adapter was trained on."
            )
        if self.misshapen:
            first, reason = next(iter(self.misshapen.items()))
            found.append(
                f"{len(self.misshapen)} of {count} modules and tensors have another shape than in {self.base}: {first} "
                f"{reason}. Name the base that the adapter was trained on."
            )
        if self.missing:
            found.append(
                f"The adapter has no factors for {len(self.missing)} modules of {self.base} that its configuration "
                f"targets: {some(self.missing)}. {CUT_ON_PURPOSE}"
            )
        return tuple(found)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was put right in names, on reading and for the base, as sentences."""
        if not self.renamed:
            return self.adapter.notes
        old, new = next(iter(self.renamed.items()))
        return (
            *self.adapter.notes,
            f"{len(self.renamed)} of {len(self.adapter.modules)} modules have other names in the adapter than in "
            f"{self.base} ({self.names.origin}), as {old}, which is {new}; the base's names were taken.",
        )

    def refuse(self) -> None:
        """Refuse an adapter that does not fit.

        Raises:
            ModelError: With the first fault.
        """
        if self.faults:
            raise ModelError(self.faults[0])

    def weight(self, module: str) -> NamedTensor | None:
        """Return the base's weight of a module of ``adapter``; None where only the model's code knows it.

        Args:
            module: Path in memory, or on disk where it is one of ``on_disk``.
        """
        if module in self.on_disk:
            return NamedTensor(None, (f"{module}.weight",))
        return self.names.weight(module)

    def stored_name(self, module: str) -> str:
        """Return the name on disk of a module's weight, as one tensor of the same values.

        Args:
            module: Path in memory, or on disk where it is one of ``on_disk``.

        Raises:
            ModelError: If there is none: it is put together of several, taken from one, or not stored.
        """
        tensor = self.weight(module)
        if tensor is None or not tensor.stored:
            raise ModelError(f"{self.base} has no weight for {module} on disk. Name a base that is complete.")
        if tensor.is_converted:
            raise ModelError(
                f"transformers makes the weight of {module} of {some(tensor.stored)} when it loads {self.base}, so it "
                "cannot be merged into on disk. Load the adapter with PeftModel.from_pretrained, call "
                "merge_and_unload() and save the model."
            )
        return tensor.stored[0]

    def is_shared(self, module: str) -> bool:
        """Tell whether a module's weight is also another's, as a head's and an embedding's.

        Args:
            module: Path in memory.
        """
        return any(f"{module}.weight" in group for group in self.names.shared)


def fit_to_base(adapter: Adapter, weights: StoredWeights, base: str) -> Fit:
    """Hold an adapter against a base whose weights are at hand.

    Args:
        adapter: The adapter, as it was read.
        weights: The base's.
        base: Its name, for messages.

    Returns:
        What fits and what does not; nothing is refused.

    Raises:
        AdapterError: If two modules of the adapter are one in the base.
        ModelError: If the base's names cannot be told.
    """
    owners = [experts.owner(path) for path in adapter.modules]
    names = read_names(weights.folder, weights.config, weights, adapter.config, owners)
    return _hold(adapter, names, base, weights, weights.config)


def fit_to_named_base(adapter: Adapter, base: str | None) -> Fit | None:
    """Hold an adapter against a base that is at hand, without loading or downloading one.

    Args:
        adapter: The adapter, as it was read.
        base: A model as ``resolve_model`` takes it; None for the one that the adapter names.

    Returns:
        What fits and what does not; None where the base is not known or not on this machine.

    Raises:
        AdapterError: If two modules of the adapter are one in the base.
        ModelError: If ``base`` is given and is not a model.
    """
    if "components" in adapter.config:
        return None  # a pipeline's models have no names of transformers' classes
    name = base or adapter.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    try:
        folder = _folder(name)
    except ModelError:
        if base is not None:
            raise
        return None
    if folder is None:
        return None
    try:
        weights: StoredWeights | None = open_weights(str(folder))
    except ModelError:
        weights = None  # a configuration alone says the names too
    owners = [experts.owner(path) for path in adapter.modules]
    try:
        config = read_json(folder / "config.json")
        names = read_names(folder, config, weights, adapter.config, owners)
    except ModelError:
        return None  # neither its class nor its weights are known
    return _hold(adapter, names, name, weights, config)


def _folder(name: str) -> Path | None:
    """Return where a base lies on this machine, if it does."""
    source = resolve_model(name, weights=False)
    if source.kind == "folder":
        return Path(source.path)
    if source.kind != "hub":
        return None  # GGUF: materializing it is work that nobody asked for
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.path, "config.json", revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


def _hold(
    adapter: Adapter,
    names: ModuleNames,
    base: str,
    weights: StoredWeights | None,
    config: Mapping[str, Any],
) -> Fit:
    check_patterns(adapter.config, names.modules, "Its configuration", AdapterError)
    adapter = _as_in_file(adapter, names)
    paths, on_disk = _paths(adapter, names, weights, config)
    taken: dict[str, str] = {}
    for old, new in paths.items():
        if new in taken:
            raise AdapterError(
                f"{taken[new]} and {old} of the adapter are one module of {base}, {new}. Combine adapters of one "
                "spelling, each held against its base: moslora combine … --base MODEL."
            )
        taken[new] = old
    unexpected: dict[str, str] = {}
    misshapen: dict[str, str] = {}
    unchecked = 0
    for old, new in paths.items():
        factors, owner = adapter.modules[old], experts.owner(new).replace(".base_layer", "")
        if owner not in names.modules and new not in on_disk:
            near = nearest(owner, names.modules) if not unexpected else None  # slow, and one is shown
            unexpected[old] = f" (nearest: {near})" if near else ""
            continue
        tensor = None if factors.form.kind == "expert" else names.weight(new)
        if new in on_disk and weights is not None and weights.quantization is None:
            stored = weights.table.get(f"{new}.weight")
            tensor = None if stored is None else NamedTensor(stored.shape)
        if tensor is None or tensor.shape is None:
            unchecked += 1
        elif not _takes(factors, tensor, adapter.config):
            misshapen[old] = (
                f"changes a {factors.form.kind} weight of (out, in) {(factors.B.shape[0], factors.A.shape[1])}, the "
                f"base's is {tensor.shape}"
            )
    extra, wrong, shapes, left = _held_extra(adapter, names, paths)
    renamed = {old: new for old, new in paths.items() if old != new}
    own = replace(adapter, extra=extra)
    return Fit(
        rename_modules(own, paths) if renamed else own,
        base,
        names,
        renamed,
        {**unexpected, **wrong},
        {**misshapen, **shapes},
        _missing(adapter, names, set(paths.values())) if not unexpected else (),
        unchecked + len(left),
        left,
        frozenset(on_disk),
        config,
    )


def _as_in_file(adapter: Adapter, names: ModuleNames) -> Adapter:
    """Put back what reading took from the beginning of paths, where the base has such modules."""
    outer = adapter.stripped
    if not outer or not all(experts.owner(f"{outer}{path}") in names.modules for path in adapter.modules):
        return adapter
    paths = {path: f"{outer}{path}" for path in adapter.modules}
    extra = {
        f"{KEY_PREFIX}{outer}{key.removeprefix(KEY_PREFIX)}": tensor for key, tensor in adapter.extra.items()
    }
    return replace(rename_modules(replace(adapter, extra=extra), paths), notes=(), stripped="")


def _paths(
    adapter: Adapter, names: ModuleNames, weights: StoredWeights | None, config: Mapping[str, Any]
) -> tuple[dict[str, str], set[str]]:
    """Find the base's path of every module, and which are modules on disk only."""
    layout = LAYOUTS.get(str(config.get("model_type")))
    apart = None if layout is None else layout.pattern()
    table = {} if weights is None else weights.table
    found = {path: path for path in adapter.modules if _owner(path) in names.modules}
    rest = [path for path in adapter.modules if path not in found]
    converted = names.convert(f"{_owner(path)}.weight" for path in rest) if rest else {}
    on_disk = set()
    for path in rest:
        name = converted.get(f"{_owner(path)}.weight")
        if name is not None and name.endswith(".weight"):
            found[path] = name.removesuffix(".weight") + path.removeprefix(_owner(path))
        elif names.is_of_class and (f"{path}.weight" in table or _is_expert(path, apart, layout, names)):
            on_disk.add(path)  # an expert of its own, which the model holds in a tensor of all
            found[path] = path
    lost = [path for path in rest if path not in found]
    old, new = _change_of_prefix(lost, adapter, names, set(found.values()))
    found |= {path: f"{new}{path.removeprefix(old)}" for path in lost if (old, new) != ("", "")}
    return {path: found.get(path, path) for path in adapter.modules}, on_disk


def _is_expert(
    path: str, apart: re.Pattern[str] | None, layout: ExpertLayout | None, names: ModuleNames
) -> bool:
    """Tell whether a module is one projection of one expert of a tensor that the base has in memory."""
    match = apart.fullmatch(path) if apart else None
    if match is None or layout is None:
        return False
    tensor = names.tensors.get(f"{match['before'] or ''}{layout.together}.down_proj")
    return tensor is not None and (tensor.shape is None or int(match["index"]) < tensor.shape[0])


def _owner(path: str) -> str:
    return experts.owner(path).replace(".base_layer", "")


def _change_of_prefix(
    paths: list[str], adapter: Adapter, names: ModuleNames, taken: Iterable[str]
) -> tuple[str, str]:
    """Find what to take from the beginning of all paths, and what to put there, so that the base has them all.

    Returns:
        Both; empty where there is nothing, or more than one way.
    """
    if not paths:
        return "", ""
    first, ways = _owner(paths[0]), set()
    parts = first.split(".")
    for cut in range(len(parts)):
        old = "".join(f"{part}." for part in parts[:cut])
        end = first.removeprefix(old)
        for module in names.modules:
            if module != end and not module.endswith(f".{end}"):
                continue
            new = module.removesuffix(end)
            if any(part.isdigit() for part in f"{old}{new}".split(".")):
                continue  # a layer is not another layer
            if old and new and old.split(".")[-2] == new.split(".")[-2]:
                continue  # the shorter change is the same one
            if all(_fits_there(path, old, new, adapter, names, taken) for path in paths):
                ways.add((old, new))
    if len(ways) == 1 and "." in first:
        return ways.pop()
    return "", ""


def _fits_there(
    path: str, old: str, new: str, adapter: Adapter, names: ModuleNames, taken: Iterable[str]
) -> bool:
    if not path.startswith(old):
        return False
    target = f"{new}{path.removeprefix(old)}"
    if _owner(target) not in names.modules or target in taken:
        return False
    tensor = names.weight(target)
    return tensor is None or tensor.shape is None or _takes(adapter.modules[path], tensor, adapter.config)


def _takes(factors: Factors, tensor: NamedTensor, config: Mapping[str, Any]) -> bool:
    """Tell whether factors are of a weight of such a shape."""
    shape, form = tensor.shape, factors.form
    own = (factors.B.shape[0], factors.A.shape[1])  # (out, in)
    assert shape is not None
    if form.kind == "embedding":
        return shape == own[::-1]
    if form.kind == "conv":
        inner = 1
        for size in shape[1:]:
            inner *= size
        is_alike = len(shape) == 2 + len(form.kernel) and shape[2:] == form.kernel and shape[0] == own[0]
        return is_alike and inner in (own[1], own[1] // form.groups)
    is_either_way = bool(config.get("fan_in_fan_out")) or tensor.is_transposed
    return shape == own or (is_either_way and shape == own[::-1])


def _held_extra(
    adapter: Adapter, names: ModuleNames, paths: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str], frozenset[str]]:
    """Hold the tensors beside the factors against the base's.

    Returns:
        They by the base's names; which have no place; which have another shape; which could not be compared.
    """
    extra: dict[str, Tensor] = {}
    wrong: dict[str, str] = {}
    shapes: dict[str, str] = {}
    unchecked = set()
    bare = {key: WITHIN.sub("", key.removeprefix(KEY_PREFIX)) for key in adapter.extra}
    converted = names.convert(name for name in bare.values() if name not in names.tensors) if bare else {}
    for key, tensor in adapter.extra.items():
        name = bare[key]
        owner, _, last = name.rpartition(".")
        own = converted.get(name, name)
        if owner in paths and own not in names.tensors:
            own = f"{paths[owner]}.{last}"
        extra[named_alike(key, name, own)] = tensor
        if last == TOKENS:
            own = f"{own.rpartition('.')[0]}.weight"
        place = names.tensors.get(own)
        if place is None and names.build is None:
            unchecked.add(key)  # only the model's own code knows what it adds to what is stored
        elif place is None:
            near = nearest(own, names.tensors) if not wrong else None
            wrong[key] = f" (nearest: {near})" if near else ""
        elif place.shape is None or not (place.stored or any(own in group for group in names.shared)):
            unchecked.add(key)  # quantized; or a new head, whose size the task decides
        elif last == TOKENS and tuple(tensor.shape[1:]) != place.shape[1:]:
            shapes[key] = f"is {tuple(tensor.shape)}, for a weight of {place.shape}"
        elif last != TOKENS and tuple(tensor.shape) != place.shape:
            shapes[key] = f"is {tuple(tensor.shape)}, the base's {place.shape}{_resized(tensor, place.shape)}"
    return extra, wrong, shapes, frozenset(unchecked)


def _resized(tensor: Tensor, shape: tuple[int, ...]) -> str:
    """Say what to do where only the number of rows differs, as that of a vocabulary."""
    if len(shape) != 2 or tuple(tensor.shape[1:]) != shape[1:]:
        return ""
    return (
        " (if the vocabulary was changed for the training, resize the base likewise, "
        f"model.resize_token_embeddings({tensor.shape[0]}), and save it)"
    )


def _missing(adapter: Adapter, names: ModuleNames, own: set[str]) -> tuple[str, ...]:
    """Return the modules that the configuration targets and the adapter lacks."""
    config = adapter.config
    targets = config.get("target_modules")
    if not targets or targets == "all-linear":
        return ()
    return tuple(
        path
        for name, tensor in names.tensors.items()
        if name.endswith(".weight") and (tensor.shape is None or len(tensor.shape) > 1)
        for path in [name.removesuffix(".weight")]
        if path not in own and targets_module(config, path)
    )
