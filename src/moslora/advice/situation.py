"""What advice is given on: the recipe, the data and the base's configuration, as far as they can be known."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moslora.data.locating import IGNORED
from moslora.errors import MoSLoRAError
from moslora.models.loading import default_device
from moslora.recipe.schema import Recipe
from moslora.recipe.trainer_arguments import resolve_trainer_arguments
from moslora.wording import first_line

if TYPE_CHECKING:
    from moslora.tasks.task import Count, Task

__all__ = ["NO_DATA", "Situation", "situation_of", "situation_of_task"]

NO_DATA = "none"  # as data.train, where a recipe names none
CHARACTERS = 4  # of a token, where no tokenizer is at hand; of English text
# Kinds of layer, by the last parts of a module's path.
ATTENTION = re.compile(
    r"(^|[._])(attn\d?|attention|self_attn|q_proj|k_proj|v_proj|o_proj|qkv|c_attn|query|key|value|to_q|to_k|to_v"
    r"|query_key_value|Wqkv)([._]|$)"
)
MLP = re.compile(
    r"(^|[._])(mlp|ffn?|feed_?forward|gate_proj|up_proj|down_proj|gate_up_proj|fc\d?|c_fc|w[123]|experts?"
    r"|intermediate|dense_h_to_4h|dense_4h_to_h|Wi|Wo)([._]|$)"
)


@dataclass(frozen=True)
class Situation:
    """What is known.

    Attributes:
        kind: The task.
        loss: The task's loss, where it has a choice; empty otherwise.
        recipe: The recipe's settings by ``section.key``, defaults filled in.
        given: Those of them that the recipe names itself.
        model: The base, as the recipe names it.
        architecture: ``model_type`` of its configuration; empty if unknown.
        hidden: Width of its hidden states; None if unknown.
        experts: How many experts are active for a token; None if it has none.
        modules: How many layers of each kind (``attention``, ``mlp``, ``other``) there are; empty if unknown.
        adapted: How many of each kind are adapted.
        trained: How many parameters are trained; None if unknown.
        examples: Rows to train on; None if unknown.
        tokens: Tokens of them that are trained on; None if unknown.
        is_estimate: Whether ``tokens`` is an estimate by characters.
        notes: What could not be found out, as sentences.
    """

    kind: str
    recipe: Mapping[str, Any]
    given: frozenset[str]
    model: str = ""
    loss: str = ""
    architecture: str = ""
    hidden: int | None = None
    experts: int | None = None
    modules: Mapping[str, int] = field(default_factory=dict)
    adapted: Mapping[str, int] = field(default_factory=dict)
    trained: int | None = None
    examples: int | None = None
    tokens: int | None = None
    is_estimate: bool = False
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of an optimizer step on one device."""
        each = int(self.recipe.get("trainer.per_device_train_batch_size") or 8)
        return each * int(self.recipe.get("trainer.gradient_accumulation_steps") or 1)

    @property
    def steps(self) -> int | None:
        """Optimizer steps on one device; None if unknown."""
        asked = self.recipe.get("trainer.max_steps")
        if isinstance(asked, int) and asked > 0:
            return asked
        epochs = self.recipe.get("trainer.num_train_epochs")
        if self.examples is None or not isinstance(epochs, int | float):
            return None
        return max(1, math.ceil(math.ceil(self.examples / self.rows) * float(epochs)))

    @property
    def epochs(self) -> float | None:
        """How often each row is seen; None if unknown."""
        if self.examples is None or self.steps is None:
            return None
        return self.steps * self.rows / self.examples

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        r = self.recipe.get("adapter.r")
        return r if isinstance(r, int) and r > 0 else 16


def situation_of(recipe: Recipe, given: frozenset[str], task: Task | None) -> Situation:
    """Find out what can be known of a recipe; what cannot is said.

    Args:
        recipe: A checked recipe; its ``data.train`` may be ``NO_DATA``.
        given: Settings that it names itself, as ``section.key``.
        task: Its task, with nothing read yet; None to look at the recipe alone.
    """
    notes: list[str] = []
    counts: list[Count] = []
    if task is not None:
        task.needs_weights = False
        try:
            counts = task.count()
        except MoSLoRAError as error:
            notes.append(f"The base's configuration was not read: {first_line(error)}")
        except Exception as error:  # of an architecture that is not known here
            notes.append(
                f"The base's layers could not be counted: {type(error).__name__}: {first_line(error)}"
            )
        if recipe.data.train != NO_DATA:
            _read(task, notes)
    return situation_of_task(recipe, given, task, counts, notes)


def _read(task: Task, notes: list[str]) -> None:
    """Read and encode the data; the tokenizer may not be at hand."""
    try:
        task.read()
    except (MoSLoRAError, OSError) as error:
        notes.append(f"The data were not read, and moslora train would refuse them: {first_line(error)}")
        return
    try:
        task.prepare()
    except Exception as error:
        notes.append(
            f"Tokens are estimated by characters, since the rows could not be encoded: {first_line(error)}"
        )


def situation_of_task(
    recipe: Recipe,
    given: frozenset[str],
    task: Task | None,
    counts: list[Count],
    notes: list[str] | None = None,
) -> Situation:
    """Return what a task knows that has been counted, read and prepared, as far as that worked.

    Args:
        recipe, given, task: As for ``situation_of``.
        counts: From ``task.count``; empty if that failed.
        notes: What could not be found out.
    """
    notes = list(notes or [])
    if recipe.data.train == NO_DATA:
        notes.append("No data are named, so steps, tokens and capacity are left out.")
    trainer = resolve_trainer_arguments(recipe, default_device())
    settings = {f"trainer.{key}": value for key, value in trainer.items()}
    settings |= {f"adapter.{key}": value for key, value in recipe.adapter.items()}
    settings |= {f"task.{key}": value for key, value in recipe.task.model_dump().items()}
    about: dict[str, Any] = {}
    if task is not None:
        about = _of_config(task) | _of_layers(task, bool(counts)) | _of_data(task)
    if counts:
        about["trained"] = sum(count.trained for count in counts)
    return Situation(
        kind=recipe.task.kind,
        loss=str(getattr(recipe.task, "loss", "") or ""),
        recipe=settings,
        given=given,
        model=recipe.model.name,
        notes=tuple(notes),
        **about,
    )


def _of_config(task: Any) -> dict[str, Any]:
    """Return width, architecture and active experts, by the base's configuration."""
    base = getattr(task, "base_model", None)
    try:
        model = getattr(base, "handed_over", None)
        config: Any = model.config if model is not None else base.config()  # type: ignore[union-attr]
    except Exception:  # there is none, or it is not at hand; the count has said why
        return {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    active = next(
        (v for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
         if isinstance(v := getattr(text, key, None), int) and v > 0),
        None,
    )  # fmt: skip
    hidden = next(
        (
            v
            for key in ("hidden_size", "n_embd", "d_model", "dim")
            if isinstance(v := getattr(text, key, None), int)
        ),
        None,
    )
    return {"hidden": hidden, "experts": active, "architecture": str(getattr(text, "model_type", "") or "")}


def _of_layers(task: Any, is_counted: bool) -> dict[str, Any]:
    """Count the base's linear layers, and those that are adapted, by kind."""
    if not is_counted or not hasattr(task, "skeleton"):
        return {}
    try:
        skeleton = task.skeleton()
        if skeleton is None:
            return {}
        config = task.adapter_config(skeleton)
        config.init_lora_weights = True  # other starts may need the weights
        return _count_layers(skeleton, config)
    except Exception:  # a wrong adapter section has been refused by the count
        return {}


def _count_layers(skeleton: Any, config: Any) -> dict[str, Any]:
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    ends = {id(module) for module in (skeleton.get_output_embeddings(),) if module is not None}
    linear = [
        name
        for name, module in skeleton.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and id(module) not in ends
    ]
    model = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    inner = model.get_base_model()
    adapted = [name for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)]
    return {"modules": _by_kind(linear), "adapted": _by_kind(adapted)}


def _by_kind(names: list[str]) -> dict[str, int]:
    kinds = {"attention": 0, "mlp": 0, "other": 0}
    for name in names:
        kinds[kind_of_layer(name)] += 1
    return kinds


def kind_of_layer(name: str) -> str:
    """Return ``"attention"``, ``"mlp"`` or ``"other"``.

    Args:
        name: A module's path; the part that tells is looked for from its end.

    Example:
        >>> kind_of_layer("model.layers.0.self_attn.o_proj"), kind_of_layer("encoder.layer.1.intermediate.dense")
        ('attention', 'mlp')
    """
    for part in reversed(name.split(".")):
        for kind, pattern in (("mlp", MLP), ("attention", ATTENTION)):
            if pattern.search(part):
                return kind
    return "other"


def _of_data(task: Any) -> dict[str, Any]:
    """Count rows, and tokens that are trained on."""
    encoded = getattr(task, "train_set", None)
    if encoded is not None:
        try:
            tokens = getattr(encoded, "trained_tokens", None)
            if tokens is None:
                tokens = sum(sum(label != IGNORED for label in _labels(row)) for row in encoded)
            return {"examples": len(encoded), "tokens": tokens or None}
        except (AttributeError, KeyError, TypeError):
            return {"examples": len(encoded)}
    rows = getattr(task, "train_examples", None)
    if rows is None:
        folder = getattr(task, "train_folder", None)
        pictures = getattr(folder, "pictures", None)
        return {"examples": len(pictures)} if pictures is not None else {}
    characters = sum(map(_characters, rows))
    return {
        "examples": len(rows),
        "tokens": max(1, characters // CHARACTERS) if characters else None,
        "is_estimate": True,
    }


def _labels(row: Any) -> Any:
    return row["labels"] if isinstance(row, Mapping) else row.labels


def _characters(example: Any) -> int:
    """Return how many characters of an example are learned."""
    messages = getattr(example, "messages", None)
    if messages is not None:
        return sum(len(m.content) for m in messages if m.role == "assistant")
    return len(getattr(example, "completion", None) or getattr(example, "text", None) or "")
