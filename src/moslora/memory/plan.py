"""What a fine-tune takes of each GPU's memory, counted before anything is downloaded or bought.

The model is built from its configuration without weights, the adapter is put on it, and one training step is run on
tensors that have a shape and a type but no values. Every tensor that the step makes is counted for as long as it
lives, so that what is kept for backward, what is computed twice under checkpointing, and what passes through at the
fullest moment come from the model's own code and not from a formula. ``tests/test_plan.py`` holds the count against
what real steps allocate.

Not counted: what the allocator leaves unused between tensors, libraries' workspaces and the CUDA context. So a card is
named only if a tenth of the total and a gigabyte are left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.display import Display, Printable
from moslora.errors import PlanError
from moslora.memory.counting import TILE_TOKENS, TILE_WORDS, count_step
from moslora.memory.four_bit import quantize_linears
from moslora.memory.placement import OPTIMISERS, Placement, Weights, place
from moslora.models.loading import load_config, quiet_transformers
from moslora.models.names import resolve_model
from moslora.recipe.preferences import LOSSES
from moslora.recipe.trainer_arguments import resolve_trainer_arguments
from moslora.tasks.base_model import refuse_misfits

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from moslora.recipe.schema import Recipe

__all__ = ["Plan", "count_memory"]

# Kinds of tasks whose model has a head of labels or rewards.
HEADS = ("classification", "reward")
GPUS = (2, 4, 8)


@dataclass(frozen=True, repr=False)
class Plan(Printable):
    """The memory of a fine-tune.

    Attributes:
        model: As the recipe names it.
        architecture: The model's class.
        parameters: Of the base.
        base: How they are stored: a dtype, or bitsandbytes' ``"nf4"``.
        trained: Numbers that are trained.
        rows: Examples on each GPU at a time.
        length: Tokens of each.
        scored: Positions of each whose token is predicted.
        optimiser: Its name.
        accumulation: Batches to a step.
        checkpointing: Whether the recipe computes activations again.
        logits: Bytes of the logits that exist at a time.
        placements: One for each way of training.
        pairs: Whether each of two rows is an answer of one pair.
        reference: Bytes beside the weights at the fullest moment of the reference's forward, which reads the training
            rows once before the first step; None without a reference.
    """

    model: str
    architecture: str
    parameters: int
    base: str
    trained: int
    rows: int
    length: int
    scored: int
    optimiser: str
    accumulation: int
    checkpointing: bool
    logits: int
    placements: tuple[Placement, ...]
    pairs: bool = False
    reference: int | None = None

    def show(self, display: Display) -> None:
        """Write what each way of training takes of a GPU."""
        kind = f"{self.base}, adapter {self.trained / 1e6:.1f} M trained numbers"
        display.say(f"{self.model}: {self.architecture}, {self.parameters / 1e9:.2f} G parameters in {kind}.")
        both = f" ({self.rows // 2} pairs, both answers)" if self.pairs else ""
        steps = f", {self.accumulation} batches to a step" if self.accumulation > 1 else ""
        display.say(
            f"On each GPU {self.rows} × {self.length} tokens{both}, {self.scored} of each row trained on{steps}; "
            f"{self.optimiser}; logits {self.logits / 1e9:.2f} GB at a time."
        )
        display.show(_placements_table(self.placements))
        if self.reference is not None:
            display.say(
                "The reference reads all training rows once, before the first step: a second forward of each, with the "
                f"adapter off and without gradients, {self.reference / 1e9:.2f} GB beside the weights. Its numbers are "
                "kept with the run, so that steps have one forward."
            )
        display.say(
            "GB of 10⁹ bytes at the fullest moment of a step; state is the optimizer's. "
            f"The recipe has checkpointing {'on' if self.checkpointing else 'off'}."
        )
        for line in self.launches():
            display.say(line)

    def launches(self) -> list[str]:
        """Return how each way is started that fits a card, with as few GPUs as it takes; ``parallel.kind`` names it."""
        found = []
        for strategy, kind in (("one", None), ("DDP", "ddp"), ("FSDP", "fsdp")):
            fitting = [
                placement
                for placement in self.placements
                if (placement.strategy, placement.checkpointing) == (strategy, self.checkpointing)
                and placement.card
            ]
            if fitting:
                least = min(fitting, key=lambda placement: (placement.card or 0, placement.gpus))
                several = f"torchrun --nproc-per-node {least.gpus} -m " if kind else ""
                more = f" parallel.kind={kind}" if kind else ""
                found.append(f"{least.gpus} × {least.card} GB: {several}moslora train RECIPE{more}")
        return found


def count_memory(
    recipe: Recipe,
    *,
    length: int | None = None,
    scored: int | None = None,
    quantize: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Count the memory that a recipe takes of each GPU.

    Args:
        recipe: A checked recipe; its data are not read.
        length: Tokens of each row; the recipe's ``trainer.max_length`` if None.
        scored: Positions of each row that are trained on; all if None.
        quantize: ``"nf4"``, to count the base in bitsandbytes' 4 bits, scales in two levels; None takes what
            the recipe sets, or what the model's own configuration has.
        say: Receives a line when something that takes long begins.

    Returns:
        The plan.

    Raises:
        ModelError: If the model's configuration cannot be read.
        PlanError: If this fine-tune cannot be counted.
    """
    if recipe.task.kind in ("vision", "image"):
        raise PlanError(
            f"task.kind is {recipe.task.kind!r}: the number of tokens of a picture depends on its processor. Only text "
            "is counted, and preferences of it."
        )
    settings = resolve_trainer_arguments(recipe, "cuda")
    name = str(settings.get("optim", "adamw_torch_fused"))
    if name not in OPTIMISERS:
        raise PlanError(
            f"trainer.optim={name!r}: the size of its state is unknown; supported: {', '.join(OPTIMISERS)}."
        )
    rows = int(settings["per_device_train_batch_size"])
    task: str = recipe.task.kind
    loss: Any = LOSSES[recipe.task.loss] if task == "preference" else None  # type: ignore[attr-defined]
    pairs = task == "reward" or (loss is not None and loss.trainer != "kto")
    rows = 2 * rows if pairs else rows  # both answers of a pair are in one batch
    whole = loss is not None and loss.trainer in ("cpo", "orpo")
    length = length or settings["max_length"]
    if length is None:
        raise PlanError("trainer.max_length is null, so rows have no largest length: give one with --length.")
    scored = length if scored is None else scored
    if not 1 <= scored <= length:
        raise PlanError(f"--scored {scored} must lie between 1 and the {length} tokens of a row.")
    wanted = settings.get("gradient_checkpointing", settings.get("activation_checkpointing", False))
    accumulation = int(settings.get("gradient_accumulation_steps", 1))

    model, base = build_adapted_model(recipe, quantize, say)
    weights = Weights.of(model)
    say(f"Counting a step of {weights.parameters / 1e9:.2f} billion parameters, on tensors without values …")
    activations = {
        checkpointing: count_step(
            model, rows, length, scored, checkpointing, accumulating=accumulation > 1, whole_logits=whole
        )
        for checkpointing in (False, True)
        if not checkpointing or model.get_base_model().supports_gradient_checkpointing  # type: ignore[operator]
    }
    reference = None
    if loss is not None and loss.has_reference:
        reference = count_step(model, rows, length, scored, False, learns=False)
    state = int(weights.trained * OPTIMISERS[name])
    ways = [("one", 1), *(("DDP", n) for n in GPUS), *(("FSDP", n) for n in GPUS)]
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    tile = min(rows * scored, TILE_TOKENS) * min(config.vocab_size, TILE_WORDS)
    has_head = task in HEADS
    item = next(model.parameters()).element_size()
    return Plan(
        model=recipe.model.name,
        architecture=type(model.get_base_model()).__name__,  # type: ignore[operator]
        parameters=weights.parameters,
        base=base,
        trained=weights.trained,
        rows=rows,
        length=length,
        scored=scored,
        optimiser=name,
        accumulation=accumulation,
        checkpointing=bool(wanted),
        logits=0 if has_head else (rows * length * config.vocab_size if whole else tile) * item,
        pairs=pairs,
        reference=reference,
        placements=tuple(
            place(strategy, gpus, checkpointing, weights, state, activations[checkpointing])
            for strategy, gpus in ways
            for checkpointing in sorted(activations, reverse=True)
        ),
    )


# --- The model, without weights -----------------------------------------------------------------------------


def build_adapted_model(
    recipe: Recipe, quantize: str | None = None, warn: Callable[[str], None] = lambda _: None
) -> tuple[nn.Module, str]:
    """Build the adapted model from its configuration, without weights.

    Args:
        recipe: A checked recipe of ``task: text``.
        quantize: As for ``count_memory``.
        warn: Told of settings that work otherwise than may be meant.

    Returns:
        PEFT's model on the meta device, and how the base is stored. Linear layers of a 4-bit base are stand-ins that
        take as many bytes and make what such a layer makes.

    Raises:
        PlanError: If the base is quantized in a way that is not counted.
        RecipeError: If a setting of the adapter fits nothing in the base.
    """
    import torch
    from peft import get_peft_model

    from moslora.tuner.config import MoSLoRAConfig

    source = resolve_model(recipe.model.name, recipe.model.revision, weights=False)
    config = load_config(source, recipe.model.trust_remote_code)
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if quantize is None and recipe.model.quantization != "none":
        quantize = recipe.model.quantization
    if quantize not in (None, "nf4"):
        raise PlanError(f"--quantize {quantize} is not supported; use nf4, which is bitsandbytes' 4 bits.")
    if stored and not stored.get("load_in_4bit") and source.gguf_file is None:
        method = stored.get("quant_method", "a method without a name")
        raise PlanError(
            f"{recipe.model.name} is stored by {method}, whose memory cannot be counted; supported: bitsandbytes' 4 "
            "bits, and models that are not quantized."
        )
    double = bool(stored.get("bnb_4bit_use_double_quant", False)) if stored else True
    is_4bit = quantize is not None or bool(stored.get("load_in_4bit"))
    with contextlib.suppress(AttributeError):
        del config.quantization_config
    kind: str = recipe.model.dtype
    if kind == "auto":
        kind = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    options: dict[str, Any] = {
        "dtype": getattr(torch, kind),
        "trust_remote_code": recipe.model.trust_remote_code,
    }
    # sdpa keeps what flash attention keeps: no score of any pair of tokens.
    options["attn_implementation"] = recipe.model.attn_implementation or "sdpa"
    if options["attn_implementation"].startswith("flash"):
        options["attn_implementation"] = "sdpa"
    try:
        with quiet_transformers(), torch.device("meta"):
            built = _class_of(recipe, config)
            try:
                model = built.from_config(config, **options)
            except ValueError:  # families without sdpa keep every score
                if recipe.model.attn_implementation is not None:
                    raise
                model = built.from_config(config, **{**options, "attn_implementation": "eager"})
    except (ValueError, TypeError, ImportError) as error:
        raise PlanError(f"{recipe.model.name} cannot be built from its configuration: {error}") from error
    settings = MoSLoRAConfig(**{"task_type": "CAUSAL_LM", **recipe.adapter, **_head_arguments(recipe, model)})
    refuse_misfits(settings, model, warn)
    adapted: nn.Module = get_peft_model(model, settings)
    if is_4bit:
        skipped = tuple(stored.get("llm_int8_skip_modules") or ())
        quantize_linears(adapted, model, double, skipped)
    return adapted, "nf4" if is_4bit else kind


def _class_of(recipe: Recipe, config: Any) -> Any:
    """Return the class that builds a recipe's model; a head has as many outputs as the recipe says, or two."""
    import transformers

    kind: str = recipe.task.kind
    task: Any = recipe.task
    if kind == "reward":
        config.num_labels = 1
    elif kind == "classification":
        config.num_labels = len(getattr(recipe.data, "labels", None) or (0, 1))
    words = kind == "classification" and getattr(task, "problem", "auto") == "tokens"
    names = {"reward": "SequenceClassification", "classification": "SequenceClassification"}
    return getattr(
        transformers, f"AutoModelFor{'TokenClassification' if words else names.get(kind, 'CausalLM')}"
    )


def _head_arguments(recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """Return the arguments of an adapter that trains a head in full; empty where there is none."""
    from moslora.models.heads import head_modules

    if recipe.task.kind not in HEADS:
        return {}
    words = getattr(recipe.task, "problem", "auto") == "tokens"
    saved = recipe.adapter.get("modules_to_save") or []
    return {
        "task_type": "TOKEN_CLS" if words else "SEQ_CLS",
        "modules_to_save": list(dict.fromkeys([*saved, *head_modules(model)])),
    }


def _placements_table(placements: Sequence[Placement]) -> Table:
    """Lay out what each way of training takes of a GPU, in GB."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("GPUs", no_wrap=True)
    table.add_column("ckpt", no_wrap=True)
    parts = ("weights", "gathered", "gradients", "optimiser", "activations", "total")
    for name in (*parts, "card"):
        table.add_column("state" if name == "optimiser" else name, justify="right", no_wrap=True)
    for placement in placements:
        if placement.strategy == "DDP" and placement.gpus > 2:
            continue  # each holds the same, however many there are
        where = {"one": "1", "DDP": "DDP, 2+", "FSDP": f"FSDP, {placement.gpus}"}[placement.strategy]
        cells = [f"{getattr(placement, name) / 1e9:.2f}" for name in parts]
        card = f"{placement.card} GB" if placement.card else "none"
        table.add_row(where, "on" if placement.checkpointing else "off", *cells, card)
    return table
