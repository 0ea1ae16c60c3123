"""Train several adapters over one frozen base at once; each result equals training it separately.

Every cell keeps its own trainer, which runs its own loop: data order, schedule, optimizer, clipping, accumulation and
logging are transformers', untouched. Only the model's work is shared. The trainers take turns, each in a thread of its
own of which one runs at a time, until all have a batch. The batches are concatenated along the batch dimension, the
base runs once over all rows, and in each adapted layer every cell's rows pass through that cell's own adapter. One
backward pass follows, and each trainer continues with its own gradients.

    cell 1   rows of batch 1 ─┐            ┌─ own adapter ─┐            ┌─ own loss 1
    cell 2   rows of batch 2 ─┼─ base W·x ─┼─ own adapter ─┼─ … layers ─┼─ own loss 2
    cell 3   rows of batch 3 ─┘            └─ own adapter ─┘            └─ own loss 3

Cells are never in one row, so no attention, no loss and no NaN reaches from one to the other. Random numbers are drawn
from a stream per cell, and dropout for the cell's own shape, so that the same entries are dropped as alone. That it is
so is proven in the first step: each cell's loss, gradients and stream are compared with those of the cell alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.comparison.joint_batch import Layout, concatenate_batches
from moslora.comparison.lanes import CannotShare, Lane, Surroundings
from moslora.wording import first_line

if TYPE_CHECKING:
    from torch import nn

__all__ = ["share_weights", "train_together"]

# Largest difference of a cell's gradients to those alone, relative to their norm: only the order of sums differs, and
# in low precision where they are rounded. A mask, row or scale that is not its own is off by tenths.
SAME_GRADIENTS = {"float32": 1e-3, "float64": 1e-9, "float16": 2e-2, "bfloat16": 5e-2}


def share_weights(model: nn.Module) -> Any:
    """Make a model of the same weights: its modules are new, its parameters and buffers are the very same.

    Args:
        model: Any model.

    Returns:
        A model into which an adapter can be put without touching the other.

    Raises:
        CannotShare: If a copy would continue running the original's modules.
    """
    for name, module in model.named_modules():
        # A copy of a method is bound to the copy, and what it closes over is the original all the same.
        if "forward" in module.__dict__:
            raise CannotShare(f"the forward of {name or 'the model'} was replaced by another")
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def train_together(
    base: nn.Module, trainers: Sequence[Any], surroundings: Sequence[Surroundings]
) -> list[Exception | None]:
    """Run the trainers' ``train()`` over one base.

    Args:
        base: The frozen model. It is only read.
        trainers: Of ``tasks.text``, each made over its own ``share_weights(base)``, none of them run yet.
        surroundings: For each trainer those that were there when it was ready: ``Surroundings.now()``.

    Returns:
        For each trainer None, or what its own loop raised; the others continue.

    Raises:
        CannotShare: If they cannot, or if the first step is not the one of each cell alone. Nothing is kept of the
            trainings then; make new trainers, and run each alone.
    """
    for trainer in trainers:
        reason = _why_alone(base, trainer)
        if reason is not None:
            raise CannotShare(reason)
    lanes = [Lane(*pair) for pair in zip(trainers, surroundings, strict=True)]
    outside = Surroundings.now()
    conductor = _Conductor(base, lanes)
    try:
        conductor.run()
    except (CannotShare, KeyboardInterrupt):
        raise
    except Exception as error:
        first = first_line(error)
        raise CannotShare(f"{type(error).__name__}: {first}") from error
    finally:
        conductor.dissolve()
        outside.install()
    return [lane.error for lane in lanes]


def _why_alone(base: Any, trainer: Any) -> str | None:
    """Tell why a trainer cannot share the base; None if nothing is known against it."""
    from moslora.tasks.text.loss import scores_plainly

    arguments = trainer.args
    shared = {id(p) for p in base.parameters()}
    if any(p.requires_grad and id(p) in shared for p in trainer.model.parameters()):
        return "it trains weights of the base"
    if not scores_plainly(trainer):
        return "its loss, or the model's logits, are not the plain ones"
    if arguments.gradient_checkpointing:
        return "with gradient checkpointing layers run twice, and would drop other entries the second time"
    if arguments.n_gpu > 1 or arguments.world_size > 1:
        return "it runs on several devices"
    config = base.config.get_text_config()
    rotary = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    if "dynamic" in rotary or "longrope" in rotary:
        return "its positions depend on the longest row of the batch, which may be another cell's"
    attention = getattr(base.config, "_attn_implementation", None) or ""
    if "flash" in attention and getattr(trainer, "padding_free", False):
        return f"{attention} takes padding-free rows one at a time"
    if arguments.torch_compile or getattr(arguments, "activation_offloading", False):
        return "compiled or offloaded layers cannot be split by rows"
    return None


# --- One forward for all ------------------------------------------------------------------------------------


class _Conductor:
    """Leads the lanes step by step.

    Args:
        base: The frozen model.
        lanes: The trainings.
    """

    def __init__(self, base: nn.Module, lanes: Sequence[Lane]) -> None:
        from torch import nn

        from moslora.comparison.junction import Junction, Precomputed, replaced_modules
        from moslora.tasks.text.loss import unwrapped

        self.lanes = list(lanes)
        self.layout = Layout()
        self.models = {id(lane): unwrapped(lane.trainer.model) for lane in lanes}
        self.carrier: Any = share_weights(base)
        self.carrier.train()
        self.stand_ins: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        own: dict[str, dict[int, nn.Module]] = {}
        for key, model in self.models.items():
            for path in replaced_modules(self.carrier, model):
                own.setdefault(path, {})[key] = model.get_submodule(path)
        head = _path_of(self.carrier, self.carrier.get_output_embeddings())
        own.pop(head, None)  # each lane runs its own, on the places that are scored
        for path in own:
            if any(path.startswith(f"{other}.") for other in own):
                raise CannotShare(f"some replace {path}, others what it stands in")
        for path, modules in own.items():
            for module in modules.values():
                if isinstance(layer := module._modules.get("base_layer"), nn.Module):
                    self.stand_ins.append((module, layer, Precomputed(layer)))
            base_module = self.carrier.get_submodule(path)
            junction = Junction(path, base_module, modules, lambda: self.layout)
            self.carrier.set_submodule(path, junction)
        self._stand_in(True)

    def _stand_in(self, wanted: bool) -> None:
        """Have every adapted layer take its base's output from the joint forward, or make it by itself again."""
        for module, layer, stand_in in self.stand_ins:
            module._modules["base_layer"] = stand_in if wanted else layer

    def run(self) -> None:
        """Train until every lane has ended."""
        live = self.lanes
        proven = False
        while True:
            for lane in live:
                lane.run()  # to its next batch
            live = [lane for lane in live if not lane.ended]
            if not live:
                return
            before = {} if proven else {id(lane): lane.surroundings.copy() for lane in live}
            self._forward(live)
            for lane in live:
                lane.run()  # to its own backward pass
            going = [lane for lane in live if not lane.ended and lane.leaf is not None]
            if going:
                self._backward(going)
            if not proven and going:
                self._prove(going, before)
                proven = True
            for lane in live:
                lane.loss = lane.leaf = None

    def _autocast(self, lane: Lane) -> Any:
        return lane.trainer.compute_loss_context_manager()

    def _forward(self, lanes: Sequence[Lane]) -> None:
        from moslora.tasks.text.loss import score_labels

        joint, self.layout = concatenate_batches(lanes)
        with self._autocast(lanes[0]):
            hidden = self.carrier.base_model(**joint, use_cache=False).last_hidden_state
            parts = hidden.split([span.rows for span in self.layout.spans])  # (rows, longest, d) each
            for span, part in zip(self.layout.spans, parts, strict=True):
                lane = span.lane
                head = self.models[id(lane)].get_output_embeddings()
                with lane.surroundings.stream(part.device):
                    total, count = score_labels(head, part[:, : span.length], lane.inputs["labels"])
                lane.loss = total / (count if lane.denominator is None else lane.denominator)

    def _backward(self, lanes: Sequence[Lane]) -> None:
        import torch

        torch.autograd.backward([lane.loss for lane in lanes], [lane.leaf.grad for lane in lanes])  # type: ignore[union-attr, arg-type]

    def _prove(self, lanes: Sequence[Lane], before: Mapping[int, Surroundings]) -> None:
        """Compare the first step of each lane with the same step alone: loss, gradients and random stream.

        Raises:
            CannotShare: If one of them differs by more than rounding.
        """
        import torch

        dtype = str(next(self.carrier.parameters()).dtype).removeprefix("torch.")
        if self.lanes[0].trainer.args.bf16 or self.lanes[0].trainer.args.fp16:
            dtype = "bfloat16" if self.lanes[0].trainer.args.bf16 else "float16"
        allowed = SAME_GRADIENTS.get(dtype, SAME_GRADIENTS["bfloat16"])
        self._stand_in(False)
        for lane in lanes:
            assert lane.loss is not None and lane.leaf is not None
            trained = lane.parameters()
            joint = [None if p.grad is None else p.grad.clone() for p in trained]
            state, reached = lane.surroundings, before[id(lane)]
            for parameter in trained:
                parameter.grad = None
            reached.install()
            with self._autocast(lane):
                loss = lane.alone()
            torch.autograd.backward([loss], [lane.leaf.grad])
            same_stream = torch.equal(torch.get_rng_state(), state.torch_state) and all(
                torch.equal(torch.cuda.get_rng_state(index), one)
                for index, one in enumerate(state.cuda_states)
            )
            norm = difference = torch.zeros((), device=loss.device, dtype=torch.float64)
            for parameter, other in zip(trained, joint, strict=True):
                mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                other_one = torch.zeros_like(parameter) if other is None else other
                norm = norm + mine.double().square().sum()
                difference = difference + (mine.double() - other_one.double()).square().sum()
                parameter.grad = other
            state.install()
            if not same_stream:
                raise CannotShare("trained alone, a cell draws other random numbers than beside others")
            # A cell that is broken from its start has nothing to compare; it is broken here as there.
            off = float((difference / norm.clamp_min(1e-300)).sqrt())
            if torch.isfinite(norm) and torch.isfinite(loss) and not off <= allowed:
                raise CannotShare(
                    f"in the first step a cell's gradients differ from those alone by {off:.1e} of their norm"
                )
            close = float((loss.detach().double() - lane.loss.detach().double()).abs())
            if torch.isfinite(loss) and not close <= allowed * max(1.0, float(loss.detach().abs())):
                raise CannotShare(
                    f"in the first step a cell's loss is {float(lane.loss.detach()):.6g}, "
                    f"alone {float(loss.detach()):.6g}"
                )
        self._stand_in(True)

    def dissolve(self) -> None:
        """End every lane that still runs, and leave each model as it would be alone."""
        for lane in self.lanes:
            lane.end()
        self._stand_in(False)
        self.layout = Layout()


def _path_of(model: nn.Module, module: nn.Module | None) -> str:
    return next((name for name, found in model.named_modules() if found is module), "")
