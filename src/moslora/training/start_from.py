"""Training that starts from an adapter: what it is, that it fits the base, and how its values get into the model.

A native adapter is taken as it is. Any other is written as a native one first, a plain LoRA with identity mixers, with
the proof that every conversion has; so there is one way in, the loader that ``PeftModel.from_pretrained`` uses.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.adapters.export import export_adapter
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.adapters.lineage import hash_files, lineage_of
from moslora.errors import AdapterError

if TYPE_CHECKING:
    from moslora.recipe.schema import Recipe

__all__ = ["StartingAdapter", "check_recorded_base", "open_start", "recorded_base"]

# A scale is alpha ÷ rank in float64, or that times √rank: a few roundings.
SAME_SCALE = 1e-9


@dataclass(frozen=True)
class StartingAdapter:
    """An adapter whose values training starts from.

    Attributes:
        path: Where it is.
        base: The base that it was trained on, as the recipe names it.
        hashes: SHA-256 of its files.
        lineage: Where it came from, if that is kept beside it.
    """

    path: Path
    base: str
    hashes: dict[str, str]
    lineage: dict[str, Any] | None

    @property
    def story(self) -> dict[str, Any]:
        """What a lineage says of it."""
        known = {} if self.lineage is None else {"lineage": self.lineage}
        return {"path": str(self.path), "hashes": self.hashes, **known}

    def check_base(self, name: str, path: str, fingerprint: Any) -> str | None:
        """Hold the base that it was trained on against the recipe's.

        Args:
            name: The recipe's base.
            path: Its folder.
            fingerprint: Its hashes.

        Returns:
            What to warn of, if the bases have other names and no hashes to compare.

        Raises:
            AdapterError: If it was trained, by hashes that are kept with it, on another base.
        """
        theirs = None if self.lineage is None else self.lineage.get("base")
        own = theirs.get("fingerprint") if isinstance(theirs, dict) else None
        config = self.path / "adapter_config.json"
        named = None
        if config.is_file():
            named = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        return check_recorded_base(self.path, own or recorded_base(self.path), named, name, path, fingerprint)

    def put_into(self, model: Any) -> None:
        """Put its values into an adapted model.

        Args:
            model: A ``PeftModel`` with a fresh adapter of the configuration that the recipe has.

        Raises:
            AdapterError: If the model has not the adapter's modules in its shapes and scales.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from peft.utils.save_and_load import load_peft_weights

        [name] = model.active_adapters
        with tempfile.TemporaryDirectory(prefix="moslora-") as folder:
            place = self.path
            if detect(self.path) != "native":
                place = Path(folder) / "native"
                export_adapter(self.path, place, "native", base=self.base)
            _check_scales(model, name, place)
            tensors = load_peft_weights(str(place), device="cpu")
            # A head that the start doesn't have, as after a language model's training, stays as it was drawn.
            fresh = get_peft_model_state_dict(model, adapter_name=name)
            tensors |= {
                key: tensor for key, tensor in fresh.items() if key not in tensors and "moslora_" not in key
            }
            result = set_peft_model_state_dict(model, tensors, adapter_name=name)
        if result.unexpected_keys:
            raise AdapterError(
                f"{self.path} has tensors that have no place in this model, as {result.unexpected_keys[0]}. Leave out "
                "what the adapter section says of structure: it is the start's."
            )


def _check_scales(model: Any, name: str, place: Path) -> None:
    """Refuse a model whose modules or scales are others than an adapter's: shapes alone would not show it."""
    from moslora.tuner.layer import MoSLoRALayer

    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, MoSLoRALayer)}
    adapter = read_adapter(place)
    parts = {module for module, factors in adapter.modules.items() if factors.form.kind == "expert"}
    strange = sorted((layers.keys() ^ adapter.modules.keys()) - parts) if not parts else []
    if strange:
        which = "the adapter" if strange[0] in layers else "this model"
        raise AdapterError(
            f"{place}: {which} has no factors for {strange[0]}, so the one cannot start from the other."
        )
    for module, layer in layers.items():
        factors = adapter.modules.get(module)
        if factors is None:
            continue
        own = float(layer.scaling[name])
        if abs(own - factors.scale) > SAME_SCALE * abs(factors.scale):
            raise AdapterError(
                f"{place}: {module} has the scale {factors.scale:g}, and the recipe's adapter section gives {own:g}. "
                "Leave out adapter.lora_alpha and adapter.use_rslora: they are the start's."
            )


def recorded_base(adapter: Path) -> dict[str, Any]:
    """Read the base's hashes from the run that an adapter lies in; empty if there is none."""
    try:
        record = json.loads((adapter.resolve().parent / "run.json").read_text(encoding="utf-8"))
        found = record["hashes"]["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def check_recorded_base(
    adapter: Path, theirs: Any, named: Any, name: str, path: str, fingerprint: Any
) -> str | None:
    """Hold what is known of an adapter's base against a recipe's.

    Args:
        adapter: Where it is, for messages.
        theirs: Hashes of its base; empty if they are not known.
        named: What its configuration calls its base; None if nothing.
        name: The recipe's base.
        path: Its folder.
        fingerprint: Its hashes.

    Returns:
        What to warn of, if the bases have other names and no hashes to compare.

    Raises:
        AdapterError: If the hashes differ.
    """
    ours = json.loads(json.dumps(fingerprint))
    kept = "commit" if ours.get("method") == "commit" else "files"
    known = theirs if isinstance(theirs, dict) else {}
    if known.get("method") == ours.get("method") and ours.get(kept) and known.get(kept):
        if known[kept] != ours[kept]:
            raise AdapterError(
                f"{adapter} was trained on another base than {name}, by the hashes that were kept, so its ΔW means "
                "nothing there. Name the base that it was trained on as model.name."
            )
        return None
    if named and named not in (name, path):
        return f"{adapter} names {named} as its base, the recipe {name}; see that it is the same."
    return None


def open_start(recipe: Recipe) -> StartingAdapter | None:
    """Return the adapter that a recipe starts from; None if it names none.

    Args:
        recipe: A checked recipe, whose adapter section has the start's structure.

    Raises:
        AdapterError: If it cannot be read.
    """
    if recipe.start_from is None:
        return None
    path = Path(recipe.start_from)
    return StartingAdapter(path, recipe.model.name, hash_files(path), lineage_of(path))
