"""What a fine-tune takes of each GPU's memory, counted before anything is downloaded or bought.

The model is built from its configuration without weights, the adapter is put on it, and one training step is run on
tensors that have a shape and a type but no values. Every tensor that the step makes is counted for as long as it
lives, so that what is kept for backward, what is computed twice under checkpointing, and what passes through at the
fullest moment come from the model's own code and not from a formula. ``tests/test_plan.py`` holds the count against
what real steps allocate.

Not counted: what the allocator leaves unused between tensors, libraries' workspaces and the CUDA context. So a card is
said to do only where a tenth of the total and a gigabyte are left.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.errors import PlanError
from moslora.models.loading import load_config, quiet_transformers
from moslora.models.names import resolve_model
from moslora.recipe.schema import load_recipe, resolve_trainer_arguments

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moslora.recipe.schema import Recipe

__all__ = ["CARDS", "Placement", "Plan", "count_step", "plan", "smallest_card"]

# Memory of common cards, in GB of 10⁹ bytes: a vendor's 80 GB are a little more than that.
CARDS = (24, 40, 48, 80, 141)
# What is left free on a card: of the total, for gaps between tensors; and bytes, for CUDA's context and workspaces.
SPARE_SHARE, SPARE_BYTES = 0.10, 1_000_000_000
GPUS = (2, 4, 8)

# Bytes of state that an optimiser keeps for each trained number, by TRL's and transformers' names.
OPTIMISERS: dict[str, float] = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_apex_fused": 8,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "rmsprop": 4,
    "adagrad": 4,
    "sgd": 0,
}

# TRL scores trained positions in tiles of so many tokens by so many words of the vocabulary, on a GPU.
TILE_TOKENS, TILE_WORDS = 4096, 32768

# bitsandbytes' 4-bit storage: half a byte, and a float32 for each block of 64; or, of two levels, one byte for each
# block and a float32 for each 256 blocks.
FOUR_BITS = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}


@dataclass(frozen=True)
class Placement:
    """What one way of training takes of each GPU, in bytes.

    Attributes:
        strategy: ``"one"``, ``"DDP"`` or ``"FSDP"``.
        gpus: How many.
        checkpointing: Whether activations are computed again in the backward pass.
        weights: Base and adapter, as they lie there between steps.
        gathered: What FSDP holds whole while a block runs; 0 otherwise.
        gradients: Of what is trained, DDP's buckets included.
        optimiser: Its state.
        activations: All else at the fullest moment of a step, logits included.
        total: The sum.
        card: GB of the smallest of ``CARDS`` that does; None if none does.
    """

    strategy: str
    gpus: int
    checkpointing: bool
    weights: int
    gathered: int
    gradients: int
    optimiser: int
    activations: int
    total: int
    card: int | None


@dataclass(frozen=True)
class Plan:
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


def smallest_card(total: int) -> int | None:
    """Return the GB of the smallest card that ``total`` bytes leave enough room on; None if none does.

    Args:
        total: Bytes at the fullest moment.

    Returns:
        One of ``CARDS``.
    """
    return next((gb for gb in CARDS if total * (1 + SPARE_SHARE) + SPARE_BYTES <= gb * 1e9), None)


def plan(
    arguments: Sequence[str],
    *,
    length: int | None = None,
    scored: int | None = None,
    quantize: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Count the memory that a recipe takes of each GPU.

    Args:
        arguments: As ``load_recipe`` takes them; data may be left out.
        length: Tokens of each row; the recipe's ``trainer.max_length`` if None.
        scored: Positions of each row that are trained on; all if None.
        quantize: ``"nf4"``, to count the base in bitsandbytes' 4 bits, scales in two levels; None takes what
            the recipe says, or what the model's own configuration says.
        say: Receives a line when something that takes long begins.

    Returns:
        The plan.

    Raises:
        RecipeError: If the recipe is wrong.
        ModelError: If the model's configuration cannot be had.
        PlanError: If this fine-tune cannot be counted.
    """
    named = any(a.split("=", 1)[0].split(".", 1)[0] == "data" for a in arguments if "=" in a)
    without_recipe = bool(arguments) and all("=" in a for a in arguments)
    recipe = load_recipe([*arguments, *(["data=none"] if without_recipe and not named else [])])
    if recipe.task.kind != "text":
        raise PlanError(
            f"task.kind is {recipe.task.kind!r}: how many tokens a picture becomes is for its processor to say. Only "
            "text is counted."
        )
    settings = resolve_trainer_arguments(recipe, "cuda")
    name = str(settings.get("optim", "adamw_torch_fused"))
    if name not in OPTIMISERS:
        raise PlanError(
            f"trainer.optim={name!r}: what it keeps is not known here; known are {', '.join(OPTIMISERS)}."
        )
    rows = int(settings["per_device_train_batch_size"])
    length = length or settings["max_length"]
    if length is None:
        raise PlanError("trainer.max_length is null, so rows have no largest length: give one with --length.")
    scored = length if scored is None else scored
    if not 1 <= scored <= length:
        raise PlanError(f"--scored {scored} must lie between 1 and the {length} tokens of a row.")
    wanted = settings.get("gradient_checkpointing", settings.get("activation_checkpointing", False))
    accumulation = int(settings.get("gradient_accumulation_steps", 1))

    model, base = build(recipe, quantize)
    weights = Weights.of(model)
    say(f"Counting a step of {weights.parameters / 1e9:.2f} billion parameters, on tensors without values …")
    activations = {
        checkpointing: count_step(model, rows, length, scored, checkpointing, accumulating=accumulation > 1)
        for checkpointing in (False, True)
        if not checkpointing or model.get_base_model().supports_gradient_checkpointing  # type: ignore[operator]
    }
    state = int(weights.trained * OPTIMISERS[name])
    ways = [("one", 1), *(("DDP", n) for n in GPUS), *(("FSDP", n) for n in GPUS)]
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    tile = min(rows * scored, TILE_TOKENS) * min(config.vocab_size, TILE_WORDS)
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
        logits=tile * item,
        placements=tuple(
            place(strategy, gpus, checkpointing, weights, state, activations[checkpointing])
            for strategy, gpus in ways
            for checkpointing in sorted(activations, reverse=True)
        ),
    )


def place(
    strategy: str, gpus: int, checkpointing: bool, weights: Weights, state: int, activations: int
) -> Placement:
    """Lay a fine-tune out over GPUs.

    Args:
        strategy: ``"one"``, ``"DDP"`` (each holds all, gradients once more in buckets) or ``"FSDP"`` (each holds its
            share, and whole: what lies outside the blocks, the running block and the next).
        gpus: How many.
        checkpointing: Whether ``activations`` are those under checkpointing.
        weights: What there is.
        state: Bytes of the optimiser's state in all.
        activations: Bytes, on each GPU.

    Returns:
        What each GPU holds.
    """
    shares = gpus if strategy == "FSDP" else 1
    gathered = weights.outside + 2 * weights.largest_block if strategy == "FSDP" else 0
    parts = {
        "weights": -(-weights.bytes // shares),
        "gathered": gathered,
        "gradients": -(-weights.gradients // shares) * (2 if strategy == "DDP" else 1),
        "optimiser": -(-state // shares),
        "activations": activations,
    }
    total = sum(parts.values())
    return Placement(strategy, gpus, checkpointing, **parts, total=total, card=smallest_card(total))


# --- The model, without weights -----------------------------------------------------------------------------


def build(recipe: Recipe, quantize: str | None = None) -> tuple[nn.Module, str]:
    """Build the adapted model from its configuration, without weights.

    Args:
        recipe: A checked recipe of ``task: text``.
        quantize: As for ``plan``.

    Returns:
        PEFT's model on the meta device, and how the base is stored. Linear layers of a 4-bit base are stand-ins that
        take as many bytes and make what such a layer makes.

    Raises:
        PlanError: If the base is quantised in a way that is not counted.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from moslora import MoSLoRAConfig

    source = resolve_model(recipe.model.name, recipe.model.revision, weights=False)
    config = load_config(source, recipe.model.trust_remote_code)
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if quantize is None and recipe.model.quantization != "none":
        quantize = recipe.model.quantization
    if quantize not in (None, "nf4"):
        raise PlanError(f"--quantize {quantize} is not counted; nf4 is, which is bitsandbytes' 4 bits.")
    if stored and not stored.get("load_in_4bit") and source.gguf_file is None:
        method = stored.get("quant_method", "a method without a name")
        raise PlanError(
            f"{recipe.model.name} is stored by {method}, whose memory is not counted; bitsandbytes' 4 bits are, and "
            "models that are not quantised."
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
            model = AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, TypeError, ImportError) as error:
        raise PlanError(f"{recipe.model.name} cannot be built from its configuration: {error}") from error
    adapted: nn.Module = get_peft_model(model, MoSLoRAConfig(task_type="CAUSAL_LM", **recipe.adapter))
    if is_4bit:
        skipped = tuple(stored.get("llm_int8_skip_modules") or ())
        _quantise(adapted, model, double, skipped)
    return adapted, "nf4" if is_4bit else kind


def _quantise(adapted: nn.Module, model: Any, double: bool, skipped: tuple[str, ...]) -> None:
    """Put stand-ins for 4-bit layers in the place of linear layers, but for the output head."""
    from torch import nn

    head = model.get_output_embeddings()
    for name, module in list(adapted.named_modules()):
        for place, child in list(module.named_children()):
            is_ours = place != "base_layer" and "moslora_" in name  # a factor
            whole = f"{name}.{place}"
            if (
                type(child) is nn.Linear
                and child is not head
                and not is_ours
                and not any(part in whole for part in skipped)
            ):
                setattr(module, place, _four_bit(child, double))


def _four_bit(linear: nn.Linear, double: bool) -> nn.Module:
    """Make what stands for a linear layer in bitsandbytes' 4 bits: its bytes, and what it makes and keeps."""
    import torch
    from torch import nn

    class Product(torch.autograd.Function):
        """As bitsandbytes multiplies: the weight is dequantised in both passes and never kept."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            weight = torch.empty(linear.out_features, linear.in_features, dtype=x.dtype, device=x.device)
            return nn.functional.linear(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor, None]:
            weight = torch.empty(linear.out_features, linear.in_features, dtype=G.dtype, device=G.device)
            return G @ weight, None

    class FourBit(nn.Module):
        """Half a byte a weight, and the scales of blocks."""

        def __init__(self) -> None:
            super().__init__()
            size = round(linear.weight.numel() * FOUR_BITS[double])
            packed = torch.empty(size, dtype=torch.uint8, device=linear.weight.device)
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.stands_for = linear.weight.numel()
            self.in_features, self.out_features, self.bias = (
                linear.in_features,
                linear.out_features,
                linear.bias,
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Product.apply(x, self.bias)  # type: ignore[no-untyped-call, no-any-return]

    return FourBit()


@dataclass(frozen=True)
class Weights:
    """What a model's parameters take.

    Attributes:
        parameters: Of the base.
        trained: Numbers that are trained.
        bytes: Of all parameters and buffers.
        gradients: Bytes of the gradients.
        largest_block: Bytes of the largest repeated block.
        outside: Bytes of what is in no block: embeddings and head.
    """

    parameters: int
    trained: int
    bytes: int
    gradients: int
    largest_block: int
    outside: int

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """Count an adapted model."""
        held = {id(t): t for t in (*model.parameters(), *model.buffers())}
        whole = sum(t.nbytes for t in held.values())
        trained = [p for p in model.parameters() if p.requires_grad]
        stand_ins = [m for m in model.modules() if hasattr(m, "stands_for")]
        base = sum(p.numel() for n, p in model.named_parameters() if "moslora_" not in n)
        base += sum(m.stands_for - m.weight.numel() for m in stand_ins)  # type: ignore[operator, misc]
        sizes = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in _blocks(model)]
        return cls(
            parameters=base,
            trained=sum(p.numel() for p in trained),
            bytes=whole,
            gradients=sum(p.nbytes for p in trained),
            largest_block=max(sizes, default=0),
            outside=whole - sum(sizes),
        )


def _blocks(model: Any) -> list[nn.Module]:
    """Return the repeated blocks that FSDP wraps, as transformers names them."""
    names = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


# --- One step, on tensors without values --------------------------------------------------------------------


def count_step(
    model: nn.Module,
    rows: int,
    length: int,
    scored: int,
    checkpointing: bool,
    device: str = "cuda",
    *,
    accumulating: bool = False,
) -> int:
    """Count what a training step takes beside weights, gradients and the optimiser's state.

    Gradients appear while activations go. What is returned is so much that with all gradients it is the fullest moment,
    or nothing where the end of the backward pass is that.

    Args:
        model: An adapted causal language model of PEFT, on any device; it is left as it is.
        rows: Examples in the batch.
        length: Tokens of each.
        scored: Positions of each that are trained on.
        checkpointing: Whether each block is computed again in the backward pass.
        device: ``"cuda"``: dropout and scores as they are made there; ``"cpu"``: as here.
        accumulating: Whether gradients of an earlier batch are there from the beginning.

    Returns:
        Bytes at the fullest moment of the forward and backward pass.

    Raises:
        PlanError: If the model's code asks for values that are not there.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _without_values(model), _training(model, checkpointing):
        for parameter in model.parameters() if accumulating else ():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        ids = torch.zeros(rows, length, dtype=torch.long)
        # Rows of one length need no mask; padded ones do, and have one here.
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool) if rows > 1 else None
        live = _live_bytes(model)
        inner: Any = model.get_base_model()  # type: ignore[operator]
        try:
            with live, _as_on(device, model):
                body = inner.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
                hidden = body.last_hidden_state[:, :scored].reshape(rows * scored, -1)
                torch.autograd.backward(_score(inner, hidden, device))
        except (RuntimeError, NotImplementedError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PlanError(
                f"{type(inner).__name__} cannot take a step on tensors without values, so that its memory cannot be "
                f"counted ({reason}). Architectures whose values decide what is computed, as experts', are such."
            ) from error
        del body, hidden
    gc.collect()
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return int(live.peak if accumulating else max(live.peak - gradients, 0))


def _score(model: Any, hidden: torch.Tensor, device: str) -> torch.Tensor:
    """Return a loss that is made as the trainer makes it there."""
    import torch

    head = model.get_output_embeddings()
    if device == "cpu":
        from moslora.tasks.text.task import score_rows

        return score_rows(head, hidden, torch.zeros(len(hidden), dtype=torch.long))
    words = head.weight.shape[0]

    class Tiles(torch.autograd.Function):
        """As TRL's fused head: one tile of logits at a time, and the gradient summed in float32."""

        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(hidden)
            hidden.new_empty(min(len(hidden), TILE_TOKENS), min(words, TILE_WORDS))
            return hidden.new_empty((), dtype=torch.float32)

        @staticmethod
        def backward(ctx: Any, G: torch.Tensor) -> torch.Tensor:
            (hidden,) = ctx.saved_tensors
            total = torch.empty_like(hidden, dtype=torch.float32)
            tile = hidden.new_empty(min(len(hidden), TILE_TOKENS), min(words, TILE_WORDS))
            del tile
            return total.to(hidden.dtype)

    return Tiles.apply(hidden)  # type: ignore[no-untyped-call, no-any-return]


@contextlib.contextmanager
def _without_values(model: nn.Module) -> Iterator[None]:
    """Give a model tensors without values inside the block."""
    import torch
    from torch import nn

    made: dict[int, Any] = {}
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            before.append((store, dict(store)))
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = empty
                store[name] = made[id(tensor)]
    try:
        yield
    finally:
        for store, values in before:
            store.update(values)


@contextlib.contextmanager
def _training(model: Any, checkpointing: bool) -> Iterator[None]:
    """Put a model into training mode inside the block, with or without checkpointing."""
    was_training, inner = model.training, model.get_base_model()
    model.train()
    # transformers 5.23 renamed these, and warns of the old names.
    new = hasattr(inner, "activation_checkpointing_enable")
    word = "activation" if new else "gradient"
    if checkpointing:
        reentrant = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(inner, f"{word}_checkpointing_enable")(**reentrant)
        inner.enable_input_require_grads()
    try:
        yield
    finally:
        if checkpointing:
            getattr(inner, f"{word}_checkpointing_disable")()
            inner.disable_input_require_grads()
        model.train(was_training)


@contextlib.contextmanager
def _as_on(device: str, model: nn.Module) -> Iterator[None]:
    """Let dropout be made as it is on a GPU: by torch, which keeps a mask of one byte for each entry."""
    from torch import nn

    from moslora.core import ops

    drops = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p] if device != "cpu" else []
    largest = ops.LARGEST_SPARSE_DROPOUT
    for module in drops:
        module.forward = functools.partial(_dropped, module.p)  # type: ignore[method-assign]
        ops.LARGEST_SPARSE_DROPOUT = 0.0  # dropout by position is for CPUs, and draws values
    try:
        yield
    finally:
        ops.LARGEST_SPARSE_DROPOUT = largest
        for module in drops:
            del module.forward


def _dropped(p: float, x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.native_dropout(x, p, True)[0]


def _live_bytes(model: nn.Module) -> Any:
    """Return a mode that counts the bytes of tensors made under it while they live; ``.peak`` is the most."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.now = self.peak = 0
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            there = (*model.parameters(), *model.buffers(), *grads)
            self.known = weakref.WeakKeyDictionary({t.untyped_storage(): True for t in there})

        def note(self, storage: torch.UntypedStorage) -> None:
            if storage in self.known:
                return
            size = storage.nbytes()
            self.known[storage] = True
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, size)

        def forget(self, size: int) -> None:
            self.now -= size

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(made):
                if isinstance(leaf, torch.Tensor):
                    self.note(leaf.untyped_storage())
            return made

    return LiveBytes()
