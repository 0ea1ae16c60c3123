"""Where factors start, beyond LoRA's own beginnings.

*Principal components* (PiSSA's idea, arXiv:2404.02948). With the r leading singular triples of the base weight, A and B
start as the singular vectors and M as the singular values over s, so that ``s·B·M·A`` is the weight's principal part:

    A = V_rᵀ    B = U_r    M = diag(σ_1 … σ_r) / s        ΔW = s·(B·M·A - B0·M0·A0)

PiSSA takes that part out of the base weight. Here the base is left alone, and where the factors started is kept beside
them, as tensors that are saved and never trained. So loading on the original base is exact, merging is, adapters live
beside each other, and any triples would do: a rounded or a randomised decomposition costs no exactness. A layer runs
one update of rank 2r, and folds into a plain LoRA of that rank. Its factors are differences, for two products that are
nearly equal, subtracted as they are, would leave their rounding:

    B·M·A - B0·M0·A0 = [B - B0, B0] · blockdiag(M, I) · [A; (M - M0)·A + M0·(A - A0)]

*QR* (OLoRA's idea, arXiv:2406.01775). With ``W0 = Q·R``, A starts as the first r rows of R and B as the first r columns
of Q. What OLoRA takes out of the base weight is subtracted here as above, so M may start as anything: where it is the
identity the adapter is OLoRA's.

*Later.* What EVA (``eva.py``) and LoftQ (``loftq.py``) start from is handed over by a call of its own.

*Orthogonal* (PEFT's ``"orthogonal"``). A and B are random, each of rank r/2, with ``B·M·A = 0``: A's columns span half
of the rank's space, and B's rows lie in what is orthogonal to their image under M.

*From a file.* A saved adapter's file holds the values of a mixer that was given as a tensor or callable, and the start
of one that began from the base weight; its configuration does not. Such a mixer is NaN until the file's values
are put in, so that nothing can run in between and be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moslora.core import functional
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.held_mixer import apply_matrix
from moslora.tuner.reading import is_called, is_present, read_matrix

__all__ = [
    "begin",
    "check",
    "check_filled",
    "draw_orthogonal",
    "forget",
    "has_start",
    "leave_unfilled",
    "make_orthogonal",
    "start_by_calls",
    "take_qr",
    "why_later",
    "with_start",
]

HELD = ("moslora_start_A", "moslora_start_M", "moslora_start_B")


class Start(nn.Module):
    """What a factor started as, never trained.

    Args:
        values: The factor at the start.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        # A parameter, not a buffer: whatever casts the factors must cast this alike, or the difference is no start.
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        """Multiply ``h`` by the factor, along its last dimension."""
        return apply_matrix(h, self.weight)


def check(layer: Any, config: MoSLoRAConfig) -> None:
    """Refuse a start where it has no meaning.

    Args:
        layer: A MoSLoRA layer.
        config: Its adapter's configuration.

    Raises:
        ValueError: With the reason and the way out.
    """
    is_lora_own = config.init_lora_weights in (True, False, "gaussian")
    if not is_lora_own and not layer.takes_starts:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is there for linear layers, and this is a "
            f"{type(layer.get_base_layer()).__name__}. Leave the module out of target_modules (or name it in "
            "exclude_modules), or start with True or 'gaussian'."
        )


def has_start(layer: Any, adapter_name: str) -> bool:
    """Tell whether an adapter's start is subtracted from it in a layer.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
    """
    return HELD[0] in layer._modules and adapter_name in layer._modules[HELD[0]]


def with_start(
    layer: Any, adapter_name: str, A: Tensor, M: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors whose product is ``B·M·A - B0·M0·A0``.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
        A, M, B: Its trained factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``.

    Returns:
        Shapes ``(2r, in)``, ``(2r, 2r)``, ``(out, 2r)``; the factors themselves if there is no start to subtract.
    """
    if not has_start(layer, adapter_name):
        return A, M, B
    dtype = torch.promote_types(A.dtype, M.dtype)
    A0, M0, B0 = (_read(layer._modules[name][adapter_name]).to(dtype) for name in HELD)
    return functional.subtract_start((A.to(dtype), M.to(dtype), B.to(dtype)), (A0, M0, B0))


def _read(start: Any) -> Tensor:
    """Return what a factor started as, by a call where it is not there without one."""
    weight: Tensor = start.weight
    if is_present(weight) or not is_called(start):
        return weight
    device = getattr(getattr(start, "_hf_hook", None), "execution_device", None)
    shape = getattr(weight, "ds_shape", weight.shape)
    return read_matrix(start, shape[-1], torch.empty((), dtype=weight.dtype, device=device))


def start_by_calls(layer: Any, x: Tensor, adapter_name: str) -> Tensor:
    """Return ``B0·M0·A0·x`` by calling what holds the start.

    Args:
        layer: A MoSLoRA layer.
        x: Its input, shape ``(..., in)``.
        adapter_name: An adapter with a start.

    Returns:
        Shape ``(..., out)``, not scaled.
    """
    for name in HELD:
        x = layer._modules[name][adapter_name](x)
    return x


def forget(layer: Any, adapter_name: str) -> None:
    """Forget the start of a former adapter of this name.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
    """
    layer._unfilled.pop(adapter_name, None)
    if has_start(layer, adapter_name):
        for name in HELD:
            del layer._modules[name][adapter_name]


@torch.no_grad()
def begin(layer: Any, adapter_name: str, config: MoSLoRAConfig) -> None:
    """Keep where an adapter started that began from its base weight; principal components are put in here.

    Args:
        layer: A MoSLoRA layer whose factors are made and lie where its base does.
        adapter_name: The adapter's name.
        config: Its configuration.

    Raises:
        ValueError: If the base weight has fewer components than the rank, or alpha is 0.
    """
    if not config.subtracts_start:
        return
    A, B = (layer._read(layer.adapter_layer_names[i], adapter_name) for i in (0, 2))
    if A.is_meta or config.is_saved:
        if not A.is_meta:
            leave_unfilled(layer, adapter_name, SAVED)
    elif config.starts_from_components:
        first, middle, last = _components(layer, adapter_name, config)
        A.copy_(first)
        B.copy_(last)
        layer.set_mixer(adapter_name, middle.to(A.dtype))
    M = layer._weight_of_mixer(adapter_name)
    for name, factor in zip(HELD, (A, M, B), strict=True):
        if name not in layer._modules:
            layer.add_module(name, nn.ModuleDict())
            layer.adapter_layer_names = (*layer.adapter_layer_names, name)
        layer._modules[name][adapter_name] = Start(factor.detach().clone())
    frozen = layer.frozen_peft_weight_names.get(adapter_name, ())
    layer.frozen_peft_weight_names[adapter_name] = (*(name for name in frozen if name not in HELD), *HELD)


def _components(layer: Any, adapter_name: str, config: MoSLoRAConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose the base weight: A, M and B with ``s·B·M·A`` its principal part."""
    r, scale = layer.r[adapter_name], layer.scaling[adapter_name]
    weight = _weight(layer, r, config)
    if not scale > 0:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} divides by alpha / r, which is {scale}."
        )
    iterations = config.component_iterations
    if iterations is None:
        U, values, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng(
            devices=[]
        ):  # the drawing that it takes leaves the starts of later layers alone
            U, values, V = torch.svd_lowrank(weight, r, niter=iterations)
        Vh = V.T
    return Vh[:r], torch.diag(values[:r] / scale), U[:, :r]


def _weight(layer: Any, r: int, config: MoSLoRAConfig) -> Tensor:
    """Return the base weight to decompose, ``(out, in)``, float32 at least."""
    weight: Tensor = layer.get_base_weight()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = weight.T if layer.fan_in_fan_out else weight
    if r > min(weight.shape):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} needs {r} components, and a weight of shape "
            f"{tuple(weight.shape)} has {min(weight.shape)}. Lower r (for such modules alone: rank_pattern)."
        )
    return weight


@torch.no_grad()
def take_qr(layer: Any, A: Tensor, B: Tensor, config: MoSLoRAConfig) -> None:
    """Start A and B as the beginnings of R and Q, ``W0 = Q·R``.

    Args:
        layer: A MoSLoRA layer.
        A: Shape ``(r, in)``; filled.
        B: Shape ``(out, r)``; filled.
        config: The adapter's configuration.

    Raises:
        ValueError: If the weight has fewer than r rows or columns.
    """
    Q, R = torch.linalg.qr(_weight(layer, len(A), config))
    A.copy_(R[: len(A)])
    B.copy_(Q[:, : len(A)])


@torch.no_grad()
def draw_orthogonal(A: Tensor, B: Tensor) -> None:
    """Draw A and B as PEFT does for ``"orthogonal"``, with ``B·A = 0``.

    Args:
        A: Shape ``(r, in)``, r even; filled.
        B: Shape ``(out, r)``; filled.
    """
    r = A.shape[0]
    Q = torch.linalg.qr(torch.randn(r, r)).Q  # (r, r)
    A.copy_((torch.randn(A.shape[1], r // 2) @ Q[0::2]).T / 10)
    B.copy_(torch.randn(r // 2, B.shape[0]).T @ Q[1::2] / 10)


@torch.no_grad()
def make_orthogonal(A: Tensor, M: Tensor, B: Tensor) -> None:
    """Turn B so that ``B·M·A = 0``, where it was drawn such that ``B·A = 0``.

    The rows of B span r/2 directions. They are replaced by the nearest r/2 that are orthogonal to the columns of M·A
    (an orthogonal Procrustes problem), so B keeps its law, and all its values if M changes nothing.

    Args:
        A: Shape ``(r, in)``, of rank r/2.
        M: Shape ``(r, r)``.
        B: Shape ``(out, r)``, of rank r/2; changed.
    """
    r = A.shape[0]
    if torch.equal(M, torch.eye(r, dtype=M.dtype, device=M.device)):
        return
    spanned = torch.linalg.svd(
        (M.double() @ A.double()) @ A.double().T
    ).U  # (r, r): col(M·A), then its complement
    free = spanned[:, r // 2 :].T  # (r/2, r)
    _, _, rows = torch.linalg.svd(B.double().T @ B.double())
    rows = rows[: r // 2]  # (r/2, r)
    U, _, Vh = torch.linalg.svd(rows @ free.T)
    B.copy_(B.double() @ rows.T @ (U @ Vh @ free))


# Why a mixer has no values yet, and what to do.
SAVED = (
    'its configuration is a saved adapter\'s (mixer="custom", or a start from weights or data), and no file was '
    "loaded. Load the adapter with PeftModel.from_pretrained; or, to start a new one, set mixer in the configuration "
    "to a tensor, a callable or a name, or for a start from weights or data make a new configuration with that "
    "init_lora_weights."
)
EVA = (
    'init_lora_weights="eva" starts from data, and none was given yet. Call '
    "peft.initialize_lora_eva_weights(model, dataloader) before the adapter is run."
)
LOFTQ = (
    'init_lora_weights="loftq" starts from the weights before quantization, and they were not given yet. Call '
    "moslora.replace_lora_weights_loftq(model, path) before the adapter is run."
)


def why_later(layer: Any, config: MoSLoRAConfig) -> str | None:
    """Tell why an adapter begins only after it was made, and what is to be done; None if it begins now.

    Args:
        layer: A MoSLoRA layer.
        config: Its adapter's configuration.
    """
    way_out = {"eva": EVA, "loftq": LOFTQ}.get(str(config.init_lora_weights))
    if way_out is not None and config.is_saved:
        return SAVED
    is_untouched = config.init_lora_weights == "loftq" and layer.quantization_backend is None
    return None if is_untouched else way_out


def leave_unfilled(layer: Any, adapter_name: str, way_out: str) -> None:
    """Leave a mixer to be filled later; until then it is NaN.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
        way_out: Why it has no values, and what to do, as the end of a sentence.
    """
    layer.set_mixer(adapter_name, torch.full_like(layer._weight_of_mixer(adapter_name), float("nan")))
    layer._unfilled[adapter_name] = way_out


def check_filled(layer: Any, adapter_name: str, M: Tensor) -> None:
    """Refuse to use a mixer into which nothing has been put yet.

    Args:
        layer: A MoSLoRA layer whose mixer was left unfilled.
        adapter_name: The adapter's name.
        M: Its mixer.

    Raises:
        ValueError: If it is still NaN.
    """
    if torch.compiler.is_compiling():
        return  # a look at values has no place in a graph; NaN would show in the output
    if torch.isnan(M.detach()).all():
        raise ValueError(
            f"The mixer of adapter {adapter_name!r} has no values: {layer._unfilled[adapter_name]}"
        )
    del layer._unfilled[adapter_name]
