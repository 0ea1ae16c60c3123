"""Where factors start, beyond LoRA's own beginnings.

*Principal components* (PiSSA's idea, arXiv:2404.02948). With the r leading singular triples of the base weight, A and B
start as the singular vectors and M as the singular values over s, so that ``s·B·M·A`` is the weight's principal part:

    A = V_rᵀ    B = U_r    M = diag(σ_1 … σ_r) / s        ΔW = s·(B·M·A - B0·M0·A0)

PiSSA takes that part out of the base weight. Here the base is left alone, and where the factors started is kept beside
them, as tensors that are saved and never trained. So loading on the original base is exact, merging is, adapters live
beside each other, and any triples would do: a rounded or a randomized decomposition costs no exactness. A layer runs
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

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moslora.core.mixers import forked_generator, mixed_norms
from moslora.core.principal import principal_components
from moslora.errors import UsageError
from moslora.tuner import bias, kept_start
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.factor_holder import FactorHolder, matrices_of
from moslora.tuner.refused import refuse_in_layer

__all__ = [
    "SAVED",
    "begin",
    "check",
    "draw_orthogonal",
    "make_orthogonal",
    "start_factors",
    "take_qr",
    "why_later",
]


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


def check(layer: FactorHolder, config: MoSLoRAConfig) -> None:
    """Refuse a start where it has no meaning.

    Args:
        layer: A MoSLoRA layer.
        config: Its adapter's configuration.

    Raises:
        UsageError: With the reason and the way out.
    """
    init = config.init_lora_weights
    if init not in (True, False, "gaussian") and not layer.takes_starts:
        refuse_in_layer(
            layer.get_base_layer(),
            f"init_lora_weights={init!r}",
            "it is there for linear layers",
            "start with True or 'gaussian'",
        )


@torch.no_grad()
def start_factors(
    layer: FactorHolder,
    adapter_name: str,
    config: MoSLoRAConfig,
    start_like_lora: Callable[[str, MoSLoRAConfig], None],
    components: Tensor | None,
) -> None:
    """Give an adapter's factors their initial values.

    A and B draw what LoRA's draw, in the same order, from torch's default generator; M draws from a
    fork of it. With one seed, LoRA and MoSLoRA therefore start with the same A in every layer.

    Args:
        layer: A MoSLoRA layer.
        adapter_name: The adapter's name.
        config: Its configuration.
        start_like_lora: Gives A and B the values that LoRA's start with.
        components: Where A starts, shape ``(r, in)``, if that is not drawn; B is zero then.

    Raises:
        ValueError: If the mixer cannot start so.
    """
    if layer.held_factors(adapter_name)[0].is_meta:
        return
    start_like_lora(adapter_name, config)
    if components is not None:
        held_A, _, held_B = layer.held_factors(adapter_name)
        held_A.copy_(components)
        nn.init.zeros_(held_B)
    if config.lora_bias and config.init_lora_weights is not False:
        bias_on_B = bias.bias_of(layer, adapter_name)
        assert bias_on_B is not None, "made with the factors"
        nn.init.zeros_(bias_on_B)
    way_out = why_later(layer, config)
    if way_out is not None:
        layer.leave_unfilled(adapter_name, way_out)
        return
    A, M, B = layer.held_factors(adapter_name)
    M = M.detach().clone()
    matrices = layer.as_matrices(adapter_name, A, M, B)
    r, generator = layer.r[adapter_name], forked_generator()
    for one_A, one_M, one_B in zip(*map(matrices_of, matrices), strict=True):
        start = config.start_mixer(r, generator)
        if start is None:
            layer.leave_unfilled(adapter_name, SAVED)
            return
        one_M.copy_(start)
        if config.match_scale:
            _, before, after = mixed_norms(one_A, one_M, one_B)
            if not after:
                raise UsageError(
                    "match_scale=True cannot rescale this mixer: its product with A is zero. Choose another mixer."
                )
            one_M.mul_(before / after)
        if config.init_lora_weights == "orthogonal":
            make_orthogonal(one_A, one_M, one_B)
    layer.set_mixer(adapter_name, M)


@torch.no_grad()
def begin(layer: FactorHolder, adapter_name: str, config: MoSLoRAConfig) -> None:
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
    A, B = (layer.read_factor(layer.adapter_layer_names[i], adapter_name) for i in (0, 2))
    if A.is_meta or config.is_saved:
        if not A.is_meta:
            layer.leave_unfilled(adapter_name, SAVED)
    elif config.starts_from_components:
        first, middle, last = _components(layer, adapter_name, config)
        A.copy_(first)
        B.copy_(last)
        layer.set_mixer(adapter_name, middle.to(A.dtype))
    kept_start.keep(layer, adapter_name, A, layer.trained_mixer(adapter_name), B)
    frozen = layer.frozen_peft_weight_names.get(adapter_name, ())
    layer.frozen_peft_weight_names[adapter_name] = (
        *(name for name in frozen if name not in kept_start.HELD),
        *kept_start.HELD,
    )


def _components(
    layer: FactorHolder, adapter_name: str, config: MoSLoRAConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose the base weight: A, M and B with ``s·B·M·A`` its principal part."""
    r, scale = layer.r[adapter_name], layer.scaling[adapter_name]
    weight = _weight(layer, r, config)
    if not scale > 0:
        raise UsageError(
            f"init_lora_weights={config.init_lora_weights!r} divides by alpha / r, which is {scale}."
        )
    iterations = config.component_iterations
    if iterations is None:
        U, values, Vh, error = principal_components(weight, r)
        layer.component_errors[adapter_name] = error
    else:
        with torch.random.fork_rng(devices=[]):  # so that later layers start as without it
            U, values, V = torch.svd_lowrank(weight, r, niter=iterations)
        Vh = V.T
    return Vh[:r], torch.diag(values[:r] / scale), U[:, :r]


def _weight(layer: FactorHolder, r: int, config: MoSLoRAConfig) -> Tensor:
    """Return the base weight to decompose, ``(out, in)``, float32 at least."""
    weight: Tensor = layer.get_base_weight()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = weight.T if layer.fan_in_fan_out else weight
    if r > min(weight.shape):
        raise UsageError(
            f"init_lora_weights={config.init_lora_weights!r} needs {r} components, and a weight of shape "
            f"{tuple(weight.shape)} has {min(weight.shape)}. Lower r (for such modules alone: rank_pattern)."
        )
    return weight


@torch.no_grad()
def take_qr(layer: FactorHolder, A: Tensor, B: Tensor, config: MoSLoRAConfig) -> None:
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


def why_later(layer: FactorHolder, config: MoSLoRAConfig) -> str | None:
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
