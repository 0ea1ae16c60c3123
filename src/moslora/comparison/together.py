"""Several trainings over one frozen base at once, each the training that it would be alone.

Every cell keeps its own trainer, which runs its own loop: data order, schedule, optimiser, clipping, accumulation and
logging are transformers', untouched. Only the model's work is shared. The trainers take turns, each in a thread of its
own of which one runs at a time, until all have a batch; the batches are laid one upon the other, the base runs once
over all rows, and in each adapted layer every cell's rows go on through that cell's own adapter. One backward pass
follows, and each trainer goes on with its own gradients.

    cell 1   rows of batch 1 ─┐            ┌─ own adapter ─┐            ┌─ own loss 1
    cell 2   rows of batch 2 ─┼─ base W·x ─┼─ own adapter ─┼─ … layers ─┼─ own loss 2
    cell 3   rows of batch 3 ─┘            └─ own adapter ─┘            └─ own loss 3

Cells are never in one row, so no attention, no loss and no NaN reaches from one to the other. Random numbers are drawn
from a stream per cell, and dropout for the cell's own shape, so that the same entries are dropped as alone. That it is
so is proven in the first step: each cell's loss, gradients and stream are compared with those of the cell alone.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["CannotShare", "Surroundings", "share", "train_together"]

# Largest difference of a cell's gradients to those alone, relative to their norm: only the order of sums differs, and
# in low precision where they are rounded. A mask, row or scale that is not its own is off by tenths.
SAME_GRADIENTS = {"float32": 1e-3, "float64": 1e-9, "float16": 2e-2, "bfloat16": 5e-2}
# What a batch may hold; anything else has a meaning that is not known here.
KNOWN_INPUTS = {"input_ids", "labels", "attention_mask", "position_ids"}
# Where examples begin in rows that hold several, for kernels that read nothing else; position ids say it too.
BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class CannotShare(Exception):  # noqa: N818 - it is no error: the cells run alone
    """Trainings cannot share their base, or not be proven to; the message says why."""


class _Abandoned(BaseException):
    """Ends a trainer's thread from within."""


def share(model: nn.Module) -> Any:
    """Make a model of the same weights: its modules are new, its parameters and buffers are the very same.

    Args:
        model: Any model.

    Returns:
        A model into which an adapter can be put without touching the other.

    Raises:
        CannotShare: If a copy would go on running the original's modules.
    """
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("forward"), types.FunctionType):
            raise CannotShare(f"the forward of {name or 'the model'} was replaced by a function")
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def train_together(
    base: nn.Module, trainers: Sequence[Any], surroundings: Sequence[Surroundings]
) -> list[Exception | None]:
    """Run the trainers' ``train()`` over one base.

    Args:
        base: The frozen model. It is only read.
        trainers: Of ``tasks.text``, each made over its own ``share(base)``, none of them run yet.
        surroundings: For each trainer those that were there when it was ready: ``Surroundings.now()``.

    Returns:
        For each trainer None, or what its own loop raised; the others go on.

    Raises:
        CannotShare: If they cannot, or if the first step is not the one of each cell alone. Nothing is kept of the
            trainings then; make new trainers, and run each alone.
    """
    for trainer in trainers:
        reason = _why_alone(base, trainer)
        if reason is not None:
            raise CannotShare(reason)
    lanes = [_Lane(*pair) for pair in zip(trainers, surroundings, strict=True)]
    outside = Surroundings.now()
    conductor = _Conductor(base, lanes)
    try:
        conductor.run()
    except (CannotShare, KeyboardInterrupt):
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
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
        return f"{attention} takes rows laid end to end one at a time"
    if arguments.torch_compile or getattr(arguments, "activation_offloading", False):
        return "compiled or offloaded layers cannot be split by rows"
    return None


# --- Whose turn it is ---------------------------------------------------------------------------------------


@dataclass
class Surroundings:
    """What a training finds outside itself, and changes: random streams, and accelerate's state of accumulation."""

    torch_state: Tensor
    cuda_states: list[Tensor]
    python_state: Any
    numpy_state: Any
    accumulation: dict[str, Any]

    @classmethod
    def now(cls) -> Surroundings:
        """Take note of the present ones."""
        import random

        import numpy
        import torch
        from accelerate.state import GradientState

        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(
            torch.get_rng_state(),
            cuda,
            random.getstate(),
            numpy.random.get_state(),
            dict(GradientState._shared_state),
        )

    def install(self) -> None:
        """Make these the present ones."""
        import random

        import numpy
        import torch
        from accelerate.state import GradientState

        torch.set_rng_state(self.torch_state)
        if self.cuda_states:
            torch.cuda.set_rng_state_all(self.cuda_states)
        random.setstate(self.python_state)
        numpy.random.set_state(self.numpy_state)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.accumulation)

    @contextlib.contextmanager
    def stream(self, device: torch.device) -> Iterator[None]:
        """Draw torch's random numbers for ``device`` from this training's stream."""
        import torch

        if device.type == "cuda":
            index = device.index if device.index is not None else torch.cuda.current_device()
            torch.cuda.set_rng_state(self.cuda_states[index], index)
            yield
            self.cuda_states[index] = torch.cuda.get_rng_state(index)
        else:
            torch.set_rng_state(self.torch_state)
            yield
            self.torch_state = torch.get_rng_state()

    def copy(self) -> Surroundings:
        """Return one that goes its own way."""
        return Surroundings(
            self.torch_state.clone(),
            [state.clone() for state in self.cuda_states],
            self.python_state,
            self.numpy_state,
            dict(self.accumulation),
        )


class _Lane:
    """One training: its trainer, its thread and what it asks of the base.

    Its trainer's loss is asked for in two halves. ``compute_loss`` hands the batch over, waits, and returns a leaf with
    the loss's value; whatever the trainer multiplies it by before going backward (accumulation, a scaler for float16)
    is then the leaf's gradient, with which the true loss goes backward together with the others'.

    Args:
        trainer: Not run yet.
        surroundings: Those that it goes on from.
    """

    def __init__(self, trainer: Any, surroundings: Surroundings) -> None:
        self.trainer = trainer
        self.surroundings = surroundings.copy()
        self.inputs: Mapping[str, Tensor] = {}
        self.denominator: Any = None
        self.loss: Tensor | None = None
        self.leaf: Tensor | None = None
        self.error: Exception | None = None
        self.ended = False
        self.abandoned = False
        self.may_run = threading.Semaphore(0)
        self.has_stopped = threading.Semaphore(0)
        self._step, self._loss = trainer.training_step, trainer.compute_loss
        trainer.training_step, trainer.compute_loss = self._training_step, self._compute_loss
        self.thread = threading.Thread(target=self._live, daemon=True)

    def _live(self) -> None:
        self.may_run.acquire()
        try:
            if not self.abandoned:
                self.trainer.train()
        except _Abandoned:
            pass
        except Exception as error:
            self.error = error
        finally:
            self.ended = True
            self.has_stopped.release()

    def _wait(self) -> None:
        """Let others run, until it is this one's turn again."""
        self.has_stopped.release()
        self.may_run.acquire()
        if self.abandoned:
            raise _Abandoned

    def _training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = self._step(model, inputs, num_items_in_batch)
        self._wait()  # for the gradients
        return loss

    def _compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs:
            return self._loss(model, inputs, return_outputs, num_items_in_batch)
        self.inputs, self.denominator = inputs, num_items_in_batch
        self._wait()  # for the loss
        assert self.loss is not None
        self.leaf = self.loss.detach().requires_grad_()
        return self.leaf

    def run(self) -> None:
        """Let it run until it waits or ends."""
        self.surroundings.install()
        if not self.thread.is_alive() and not self.ended:
            self.thread.start()
        self.may_run.release()
        self.has_stopped.acquire()
        self.surroundings = Surroundings.now()

    def end(self) -> None:
        """End it wherever it is, and give the trainer its own methods back."""
        self.abandoned = True
        if self.thread.is_alive():
            self.may_run.release()
            self.thread.join()
        del self.trainer.training_step, self.trainer.compute_loss
        self.loss = self.leaf = None
        self.inputs = {}

    def alone(self) -> Tensor:
        """Compute its loss as it would be alone."""
        return self._loss(self.trainer.model, self.inputs, num_items_in_batch=self.denominator)  # type: ignore[no-any-return]

    def parameters(self) -> list[nn.Parameter]:
        """Return what it trains."""
        return [p for p in self.trainer.model.parameters() if p.requires_grad]


# --- One forward for all ------------------------------------------------------------------------------------


@dataclass
class _Span:
    """Where a lane's batch lies in the joint one: ``rows`` rows in its turn, the first ``length`` places of each."""

    lane: _Lane
    rows: int
    length: int


@dataclass
class _Layout:
    """How the present joint batch is laid out."""

    spans: list[_Span] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and places per row."""
        return sum(s.rows for s in self.spans), max(s.length for s in self.spans)


def _lay(lanes: Sequence[_Lane]) -> tuple[dict[str, Tensor], _Layout]:
    """Lay batches one upon the other, short rows filled up behind.

    Causal models see nothing of what stands behind, and where a batch has a mask it says so. In rows that hold several
    examples end to end, told by position ids, the filling is one example more.
    """
    import torch
    from torch.nn import functional as F

    keys = {frozenset(name for name in lane.inputs if lane.inputs[name] is not None) for lane in lanes}
    names = next(iter(keys))
    names, boundaries = names - BOUNDARIES, names & BOUNDARIES
    unknown = names - KNOWN_INPUTS
    if boundaries and "position_ids" not in names:
        unknown = unknown | boundaries
    if len(keys) > 1 or unknown:
        differing = ", ".join(sorted(unknown)) or " and ".join(str(sorted(key)) for key in keys)
        raise CannotShare(f"their batches cannot be laid together: {differing}")
    layout = _Layout([_Span(lane, *lane.inputs["input_ids"].shape) for lane in lanes])
    _, longest = layout.shape
    joint = {}
    for name in sorted(names - {"labels"}):
        parts = []
        for span in layout.spans:
            part, missing = span.lane.inputs[name], longest - span.length
            if name == "position_ids":
                filling = torch.arange(missing, device=part.device, dtype=part.dtype).expand(span.rows, -1)
                parts.append(torch.cat([part.expand(span.rows, -1), filling], dim=1))
            else:
                parts.append(F.pad(part, (0, missing)))  # token 0, or a mask's 0
        joint[name] = torch.cat(parts)  # (all rows, longest)
    return joint, layout


def _make_precomputed(layer: nn.Module) -> nn.Module:
    """Stand in for a base layer whose output is known already.

    Whatever the adapter's layer does with it, its output is the base layer's: for the input that it was computed from
    it is handed out, for any other one it is computed.
    """
    from torch import nn

    class Precomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = layer  # PEFT finds the true one behind this name
            self.given: tuple[Any, Any] | None = None

        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            if self.given is not None and self.given[0] is x:
                return self.given[1]
            return self.base_layer(x, *args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("base_layer"), name)

    return Precomputed()


def _make_junction(
    path: str, base: nn.Module, own: Mapping[int, nn.Module], conductor: _Conductor
) -> nn.Module:
    """Make the module that runs the base's over all rows, and each lane's own over its rows.

    Args:
        path: Where it stands, for messages.
        base: The base's module.
        own: By the lane's ``id`` the module that stands there in its model; lanes without one keep the base's output.
        conductor: Who knows the layout.
    """
    import torch
    from torch import nn

    class Junction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = base
            # Out of sight: their parameters belong to the lanes.
            object.__setattr__(self, "own", dict(own))
            random = {
                key: any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())
                for key, module in own.items()
            }
            object.__setattr__(self, "random", random)

        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            out = self.base(x, *args, **kwargs)
            layout = conductor.layout
            if tuple(x.shape[:2]) != layout.shape or tuple(out.shape[:2]) != layout.shape:
                raise CannotShare(f"{path} does not see whole rows (its input is {tuple(x.shape)})")
            rows = [span.rows for span in layout.spans]
            parts = []
            for span, ins, outs in zip(layout.spans, x.split(rows), out.split(rows), strict=True):
                mine = self.own.get(id(span.lane))
                if mine is None:
                    parts.append(outs)
                    continue
                short, known = ins[:, : span.length], outs[:, : span.length]  # its own shape, as alone
                stand_in: Any = getattr(mine, "base_layer", None)
                if hasattr(stand_in, "given"):
                    stand_in.given = (short, known)
                try:
                    drawing = span.lane.surroundings.stream(x.device) if self.random[id(span.lane)] else None
                    with drawing or contextlib.nullcontext():
                        made = mine(short, *args, **kwargs)
                finally:
                    if hasattr(stand_in, "given"):
                        stand_in.given = None
                # What fills a row up is the base's; nothing that counts sees it.
                parts.append(made if span.length == x.shape[1] else _fill(made, outs, span.length))
            return torch.cat(parts)

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("base"), name)

    return Junction()


def _fill(made: Tensor, outs: Tensor, length: int) -> Tensor:
    import torch

    return torch.cat([made, outs[:, length:]], dim=1)


def _replaced(base: nn.Module, own: nn.Module, prefix: str = "") -> Iterator[str]:
    """Name the places where ``own`` has another kind of module than ``base``."""
    if type(base) is not type(own):
        yield prefix
        return
    theirs = dict(own.named_children())
    for name, child in base.named_children():
        yield from _replaced(child, theirs[name], f"{prefix}.{name}" if prefix else name)


class _Conductor:
    """Leads the lanes step by step.

    Args:
        base: The frozen model.
        lanes: The trainings.
    """

    def __init__(self, base: nn.Module, lanes: Sequence[_Lane]) -> None:
        from torch import nn

        from moslora.tasks.text.loss import unwrapped

        self.lanes = list(lanes)
        self.layout = _Layout()
        self.models = {id(lane): unwrapped(lane.trainer.model) for lane in lanes}
        self.carrier: Any = share(base)
        self.carrier.train()
        self.stand_ins: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        own: dict[str, dict[int, nn.Module]] = {}
        for key, model in self.models.items():
            for path in _replaced(self.carrier, model):
                own.setdefault(path, {})[key] = model.get_submodule(path)
        head = _path_of(self.carrier, self.carrier.get_output_embeddings())
        own.pop(head, None)  # each lane runs its own, on the places that are scored
        for path in own:
            if any(path.startswith(f"{other}.") for other in own):
                raise CannotShare(f"some replace {path}, others what it stands in")
        for path, modules in own.items():
            for module in modules.values():
                if isinstance(layer := module._modules.get("base_layer"), nn.Module):
                    self.stand_ins.append((module, layer, _make_precomputed(layer)))
            junction = _make_junction(path, self.carrier.get_submodule(path), modules, self)
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

    def _autocast(self, lane: _Lane) -> Any:
        return lane.trainer.compute_loss_context_manager()

    def _forward(self, lanes: Sequence[_Lane]) -> None:
        from moslora.tasks.text.loss import score_labels

        joint, self.layout = _lay(lanes)
        with self._autocast(lanes[0]):
            hidden = self.carrier.base_model(**joint, use_cache=False).last_hidden_state
            parts = hidden.split([span.rows for span in self.layout.spans])  # (rows, longest, d) each
            for span, part in zip(self.layout.spans, parts, strict=True):
                lane = span.lane
                head = self.models[id(lane)].get_output_embeddings()
                with lane.surroundings.stream(part.device):
                    total, count = score_labels(head, part[:, : span.length], lane.inputs["labels"])
                lane.loss = total / (count if lane.denominator is None else lane.denominator)

    def _backward(self, lanes: Sequence[_Lane]) -> None:
        import torch

        torch.autograd.backward([lane.loss for lane in lanes], [lane.leaf.grad for lane in lanes])  # type: ignore[union-attr, arg-type]

    def _prove(self, lanes: Sequence[_Lane], before: Mapping[int, Surroundings]) -> None:
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
        self.layout = _Layout()


def _path_of(model: nn.Module, module: nn.Module | None) -> str:
    return next((name for name, found in model.named_modules() if found is module), "")
