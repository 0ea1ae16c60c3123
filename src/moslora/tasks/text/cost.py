"""What tuning cost, passage by passage: the loss of base and tuned model, and how far the tuned one is from the base.

    KL(base ‖ tuned) at a position  =  Σ_v p(v)·(log p(v) − log q(v))     p: the base's, q: the tuned model's

The sum is exact, over the whole vocabulary. The base is the tuned model with its adapter switched off, and with the
weights put back that training changes in place (biases of the base, or everything where there is no adapter).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.distributed import is_split, no_gradients
from moslora.tasks.text.loss import labeled_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moslora.tasks.text.loss import Batch

__all__ = ["Changed", "Costs", "as_base", "keep_changed", "passage_costs"]

# Labeled positions whose log-probabilities under both models are in memory at once.
COST_ROWS = 512
# Starts of PEFT's own LoRA that leave the base's weights alone.
GENTLE_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mixer", "kaiming", "lora_ga")

# Parameters that training may change in place, each with the values that it had.
Changed = Sequence[tuple["nn.Parameter", "Tensor"]]


@dataclass
class Costs:
    """Sums of each passage, in the order of the set.

    Attributes:
        tokens: Positions that were measured.
        base: Negative log-likelihood under the base, in nats.
        tuned: The same under the tuned model; empty where there is none.
        kl: KL(base ‖ tuned), summed over positions, in nats; empty where there is no tuned model.
    """

    tokens: list[int]
    base: list[float]
    tuned: list[float]
    kl: list[float]


def keep_changed(model: nn.Module, config: Any, everything: bool = False) -> Changed:
    """Copy what training, or putting an adapter in, changes of the base itself.

    Args:
        model: The base.
        config: The adapter's configuration; None where there is no adapter.
        everything: Whether every weight may change.

    Returns:
        Nothing for adapters that leave the base alone, as MoSLoRA's and LoRA's do; copies are on the CPU.
    """
    is_own = str(getattr(getattr(config, "peft_type", None), "value", "")) == "MOSLORA"
    start = getattr(config, "init_lora_weights", True)
    if config is None or everything or not (is_own or start in GENTLE_STARTS):
        return [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in model.parameters()]
    if getattr(config, "bias", "none") in ("none", None):
        return []
    named = model.named_parameters()
    return [(p, p.detach().to("cpu", copy=True)) for name, p in named if name.rpartition(".")[2] == "bias"]


@contextlib.contextmanager
def as_base(model: Any, changed: Changed = ()) -> Iterator[None]:
    """Make a tuned model compute what its base did, for a while; what is trained stays trained.

    Args:
        model: PEFT's around the base, or the model itself where everything was trained.
        changed: From ``keep_changed``.
    """
    import torch

    if is_split(model):
        from moslora.compat.peft.functions import adapters_off

        # PEFT's own way changes what requires gradients, which parts that are not gathered now would not hear of.
        with adapters_off(model):
            yield
        return
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        # PEFT warns that biases of the base stay changed; they are put back below.
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")
        if hasattr(model, "disable_adapter"):
            stack.enter_context(model.disable_adapter())
        tuned = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter, _ in changed]
        with torch.no_grad():
            for parameter, values in changed:
                parameter.copy_(values)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, values in tuned:
                    parameter.copy_(values)
    for parameter, wants in wanted:  # switching an adapter on again makes all of it trainable
        parameter.requires_grad_(wants)


def passage_costs(
    model: nn.Module, batches: Iterable[Batch], device: str, changed: Changed = (), tuned: bool = True
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Measure base and tuned model on the same positions, batch by batch.

    Args:
        model: The tuned model, or the base if not ``tuned``; it is put into evaluation mode.
        batches: The positions of each batch's passages in their set, and the model's arguments with ``labels``.
        device: Where the model is.
        changed: From ``keep_changed``.
        tuned: Whether there is a tuned model.

    Yields:
        Per batch: the positions of its passages, and by the names of ``Costs`` the sums of each, ``(rows,)``.
    """
    import torch
    from torch import nn

    model.eval()
    for numbers, tensors in batches:
        arguments = {name: tensor.to(device) for name, tensor in tensors.items()}
        labels = arguments.pop("labels")
        trained = labels[:, 1:] != -100  # (rows, length - 1)
        targets = labels[:, 1:][trained]  # (tokens,)
        place = trained.nonzero()[:, 0]  # the row of each token
        sums = {name: torch.zeros(len(labels), dtype=torch.float64) for name in ("base", "tuned", "kl")}
        with no_gradients(model):
            with _base_of(model, changed, tuned):
                head, base_rows = labeled_rows(model, arguments, trained)
            rows = labeled_rows(model, arguments, trained)[1] if tuned else base_rows
            head_differs = tuned and (bool(changed) or type(head) not in (nn.Linear, nn.Identity))
            for start in range(0, len(targets), COST_ROWS):
                part = slice(start, start + COST_ROWS)
                with _base_of(model, changed, head_differs):
                    base = head(base_rows[part]).float().log_softmax(-1)  # (tokens, vocabulary)
                found = {"base": -_of_targets(base, targets[part])}
                if tuned:
                    now = head(rows[part]).float().log_softmax(-1)
                    found |= {"tuned": -_of_targets(now, targets[part]), "kl": _divergence(base, now)}
                for name, values in found.items():
                    sums[name].index_add_(0, place[part].cpu(), values.double().cpu())
        yield numbers, {**sums, "tokens": trained.sum(dim=1).cpu()}


def _base_of(model: Any, changed: Changed, differs: bool) -> contextlib.AbstractContextManager[None]:
    return as_base(model, changed) if differs else contextlib.nullcontext()


def _of_targets(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return log_probabilities.gather(-1, targets[:, None])[:, 0]


def _divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """Return KL(base ‖ tuned) of each row of log-probabilities; what the base never says counts nothing."""
    import torch

    p = base.exp()
    terms = torch.where(p > 0, p * (base - tuned), torch.zeros_like(p))
    return terms.double().sum(-1)
