"""Whom one talks to: a base and its adapters in one model, each adapter proven active, the tokenizer as in training."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.adapters.cards.measured import read_measured
from moslora.adapters.formats.directory import CONFIG, read_config
from moslora.errors import ProofError, UsageError
from moslora.evaluation.active import as_inputs, prove_active, with_adapter
from moslora.files import scratch
from moslora.models.loading import default_device, load_tokenizer
from moslora.models.names import ModelSource
from moslora.models.tokenizer_files import read_tokenizer
from moslora.recipe.loading import load_recipe
from moslora.recipe.schema import ModelSection, Recipe
from moslora.tasks.base_model import BaseModel

if TYPE_CHECKING:
    from moslora.evaluation.results import Activity

__all__ = ["BASE", "Subjects", "load_subjects"]

BASE = "base"
PROBE = "Hello! What can you do for me today?"
# Of the largest logit: what the base may differ by with the adapters in it and switched off.
UNCHANGED = 1e-4


@dataclass
class Subjects:
    """The models that answer.

    Attributes:
        model: PEFT's model, with every adapter in it.
        tokenizer: As in training.
        template: The recipe's ``data.template``.
        device: Where it computes.
        base: What the base was called.
        adapters: By the name in the conversation, where each adapter is.
        activity: By the same names, what proves that each is active.
        max_new_tokens: Of the recipe; None if there is none.
        notes: What to know, as sentences.
        warnings: What may be wrong, as sentences.
    """

    model: Any
    tokenizer: Any
    template: str
    device: str
    base: str
    adapters: dict[str, Path]
    activity: dict[str, Activity] = field(default_factory=dict)
    max_new_tokens: int | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Who answers, in the order of the columns."""
        return [BASE, *self.adapters]

    def speaking(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the model is one of them.

        Args:
            name: One of ``names``.
        """
        if name == BASE:
            return self.model.disable_adapter()  # type: ignore[no-any-return]
        self.model.set_adapter(name)
        return contextlib.nullcontext()


@dataclass(frozen=True)
class _Found:
    """An adapter, and the run that it is of."""

    name: str
    path: Path
    recipe: Recipe | None
    template_hash: str | None


def load_subjects(adapters: Sequence[Path], base: str | None, say: Callable[[str], None]) -> Subjects:
    """Load a base with adapters, and prove each active.

    Args:
        adapters: Folders that PEFT loads, or run directories, whose plain LoRA is meant.
        base: The base; None for the one of the first adapter's run, or that it names.
        say: Receives progress, a line each.

    Raises:
        AdapterError, ModelError: If something cannot be read.
        ProofError: If an adapter does not fit, is not active, or changes the base itself.
        UsageError: If an adapter is not of a language model, or the base is not known.
    """
    found = _found(adapters)
    first = found[0]
    section = _model_section(first, base)
    source = BaseModel(section, "AutoModelForCausalLM")
    source.find(needs_weights=True)
    source.convert(say)
    tokenizer = _tokenizer(source, first, section)
    say(f"Loading {section.name} …")
    device = default_device()
    model = source.load(device)
    template = str(getattr(first.recipe and first.recipe.data, "template", "auto"))
    subjects = Subjects(
        model=model,
        tokenizer=tokenizer,
        template=template,
        device=device,
        base=section.name,
        adapters={one.name: one.path for one in found},
        max_new_tokens=getattr(first.recipe and first.recipe.task, "max_new_tokens", None),
    )
    _check_template(subjects, first)
    ids = as_inputs([tokenizer(PROBE)["input_ids"]])
    before = _logits(model, ids[0], device)
    with _of_one_type(found, subjects.notes) as paths:
        subjects.model = with_adapter(model, paths[0], found[0].name)
        for one, path in zip(found[1:], paths[1:], strict=True):
            with_adapter(subjects.model, path, one.name)
        for one, path in zip(found, paths, strict=True):
            subjects.model.set_adapter(one.name)
            subjects.activity[one.name] = prove_active(subjects.model, path, ids, device)
    with subjects.model.disable_adapter():
        moved = float((_logits(subjects.model, ids[0], device) - before).abs().max())
    if moved > UNCHANGED * float(before.abs().max()):
        raise ProofError(
            f"With its adapters switched off the base gives other logits than before (by up to {moved:.2g}): an "
            "adapter changes the base's own weights, as PEFT's PiSSA does, so the two cannot be compared in one model. "
            "Write it whole first: moslora export ADAPTER OUT --base MODEL"
        )
    return subjects


def _logits(model: Any, ids: Any, device: str) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=ids.to(device)).logits.float()


def _found(adapters: Sequence[Path]) -> list[_Found]:
    """Find adapters and their runs, each with a name of its own."""
    found: list[_Found] = []
    for given in adapters:
        path = given / "lora" if (given / "run.json").is_file() and not (given / CONFIG).is_file() else given
        if path != given and not (path / CONFIG).is_file():
            _refuse_other_kinds(given, given, _recipe_of(given))
            raise UsageError(f"{given} is a run without a plain LoRA (lora/): it has not ended.")
        read_config(path)  # raises, with the nearest name
        run = path.absolute().parent
        recipe = _recipe_of(run) if (run / "run.json").is_file() else None
        _refuse_other_kinds(given, run, recipe)
        stem = run.name if recipe is not None else path.absolute().name
        if recipe is not None and path.name != "lora":
            stem = f"{stem}-{path.name}"
        stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in stem) or "adapter"
        taken = {BASE, *(one.name for one in found)}
        name = next(n for i in range(1, 1000) if (n := stem if i == 1 else f"{stem}-{i}") not in taken)
        found.append(_Found(name, path, recipe, _template_hash(run, path)))
    return found


def _refuse_other_kinds(path: Path, run: Path, recipe: Recipe | None) -> None:
    """Refuse runs whose model does not write text alone."""
    if recipe is None:
        return
    kind, named = recipe.task.kind, (_record_of(run).get("base") or {}).get("auto_class")
    if named == "AutoModelForCausalLM" or (named is None and kind == "text"):
        return
    other = {
        "image": "Draw with it instead: moslora report shows its pictures, and diffusers loads its LoRA.",
        "vision": "Ask it on pictures instead: moslora evaluate MODEL --adapter ADAPTER --data FILE --predictions OUT.",
    }
    text = f"{path} is of task: {kind}, and chat talks to models that write text. {other.get(kind, '')}"
    raise UsageError(text.rstrip())


def _record_of(run: Path) -> dict[str, Any]:
    """Return ``run.json``; empty if there is none."""
    try:
        found = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _recipe_of(run: Path) -> Recipe | None:
    file = run / "recipe.yaml"
    return load_recipe([str(file)]) if file.is_file() else None


def _template_hash(run: Path, adapter: Path) -> str | None:
    """Return the hash of the chat template that was trained with; None if it is not known."""
    hashes = _record_of(run).get("hashes") or {}
    found = hashes.get("chat_template") or (read_measured(adapter) or {}).get("chat_template")
    return found if isinstance(found, str) else None


def _model_section(first: _Found, base: str | None) -> ModelSection:
    """Return which base is loaded and how: as the run did, or as the caller says."""
    if first.recipe is not None and base in (None, first.recipe.model.name):
        return first.recipe.model
    name = base or read_config(first.path).get("base_model_name_or_path")
    if not name:
        raise UsageError(f"{first.path} does not name its base. Give it with --base MODEL.")
    if first.recipe is not None:
        return first.recipe.model.model_copy(update={"name": str(name), "revision": None})
    return ModelSection(name=str(name))


def _tokenizer(source: BaseModel, first: _Found, section: ModelSection) -> Any:
    """Load the tokenizer of the training: the recipe's, that beside the adapter, or the base's."""
    beside = read_tokenizer(first.path)
    if section.tokenizer is None and beside is not None and beside.has_vocabulary:
        return load_tokenizer(ModelSource(str(first.path), "folder", str(first.path.absolute())))
    return load_tokenizer(source.tokenizer_source, section.trust_remote_code)


def _check_template(subjects: Subjects, first: _Found) -> None:
    """Say where the chat template is not the one of the training."""
    template = subjects.tokenizer.chat_template
    now = None if template is None else hashlib.sha256(str(template).encode()).hexdigest()
    if first.template_hash is not None and now != first.template_hash:
        subjects.warnings.append(
            "The chat template is not the one of the training, so the tuned model sees prompts that it does not know."
        )
    if not template and subjects.template != "plain":
        subjects.warnings.append(
            "The tokenizer has no chat template: a question is the whole prompt, and nothing that was said before."
        )


@contextlib.contextmanager
def _of_one_type(found: Sequence[_Found], notes: list[str]) -> Any:
    """Yield paths of adapters that one model can hold: of different types, each as a plain LoRA."""
    from moslora.adapters.export import export_adapter

    types = [read_config(one.path)["peft_type"] for one in found]
    if len(set(types)) < 2:
        yield [one.path for one in found]
        return
    with scratch("moslora-chat") as folder:
        paths = []
        for number, (one, type_) in enumerate(zip(found, types, strict=True)):
            place = one.path
            if type_ != "LORA":
                place = folder / str(number)
                error = export_adapter(one.path, place).max_relative_error
                notes.append(
                    f"{one.name} is folded into a plain LoRA here (largest relative error of ΔW {error:.1e})."
                )
            paths.append(place)
        yield paths
