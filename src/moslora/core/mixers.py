"""The table of mixers: what M starts as, and whether it may be learned.

A new mixer is one entry of ``MIXERS``. A start from which nothing can be learned is refused with the reason.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from moslora.core.functional import two_subspace_mixer
from moslora.errors import UsageError
from moslora.wording import did_you_mean

__all__ = [
    "CUSTOM",
    "DEFAULTS",
    "MIXERS",
    "SINGULAR_VALUES",
    "Mixer",
    "draw_mixer",
    "find_mixer",
    "forked_generator",
    "initial_mixer",
    "mixed_norms",
]

# What a configuration calls a mixer that starts with the singular values of the base weight.
SINGULAR_VALUES = "singular-values"
# What a configuration calls a mixer that was given as a tensor or a callable.
CUSTOM = "custom"


@dataclass(frozen=True)
class Mixer:
    """How a mixer starts.

    Attributes:
        fill: Gives the initial M, shape ``(r, r)``, float32, from the rank and a random generator.
        learned: Whether M is trained when the user does not say.
        source: Where it comes from.
    """

    fill: Callable[[int, Generator | None], Tensor]
    learned: bool
    source: str


def _kaiming(r: int, generator: Generator | None) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(r, r), a=math.sqrt(5), generator=generator)


def _orthogonal(r: int, generator: Generator | None) -> Tensor:
    return nn.init.orthogonal_(torch.empty(r, r), generator=generator)


def _gaussian(r: int, generator: Generator | None) -> Tensor:
    # Standard deviation 1/sqrt(r) keeps ‖M·A‖ at ‖A‖ in expectation.
    return torch.randn(r, r, generator=generator) / math.sqrt(r)


def _identity(r: int, generator: Generator | None) -> Tensor:
    return torch.eye(r)


def _two_subspace(r: int, generator: Generator | None) -> Tensor:
    return two_subspace_mixer(r)


MIXERS: dict[str, Mixer] = {
    "kaiming": Mixer(_kaiming, True, "released code; language and vision-language runs, arXiv:2406.11909"),
    "orthogonal": Mixer(_orthogonal, True, "SDXL runs, arXiv:2406.11909"),
    "gaussian": Mixer(_gaussian, True, "ablation, arXiv:2406.11909"),
    "identity": Mixer(_identity, True, "starts as LoRA; ablation, arXiv:2406.11909"),
    "two-subspace": Mixer(_two_subspace, False, "fixed mixing of two halves, arXiv:2406.11909, eq. 2"),
}

# The default, and what it was before 0.2. A kaiming mixer starts at 0.58 of LoRA's scale, so that at LoRA's learning
# rate it loses to LoRA (benchmarks/results/evidence/home/confirmed); an orthogonal one does not.
DEFAULTS = ("orthogonal", "kaiming")

REFUSED: dict[str, str] = {
    "zeros": (
        'mixer="zeros" cannot learn: B starts at zero, and with M at zero too every gradient '
        "(dA = MᵀdA', dM = s·(GB)ᵀH, dB = s·GᵀH Mᵀ) is zero, for good. "
        'Use mixer="identity" to start as plain LoRA.'
    ),
}
REFUSED["zero"] = REFUSED["zeros"]
REFUSED[SINGULAR_VALUES] = (
    f'mixer="{SINGULAR_VALUES}" is what a start from principal components makes of M. Leave mixer out and set '
    'init_lora_weights="pissa" (or "loftq", on a quantized base).'
)
REFUSED[CUSTOM] = (
    f'mixer="{CUSTOM}" stands in saved adapters whose mixer was given as a tensor or a callable; the values it started '
    "from are not kept. To start a new adapter give them again, mixer=tensor or mixer=callable, or choose one of "
    f"{sorted(MIXERS)}."
)


def find_mixer(name: str) -> Mixer:
    """Look up a mixer.

    Args:
        name: A key of ``MIXERS``.

    Returns:
        The table's entry.

    Raises:
        UsageError: If the name is unknown, or names a start that cannot learn.
    """
    if name in REFUSED:
        raise UsageError(REFUSED[name])
    if name not in MIXERS:
        raise UsageError(
            f"mixer={name!r} is unknown; choose one of {sorted(MIXERS)}.{did_you_mean(name, MIXERS)}"
        )
    return MIXERS[name]


def initial_mixer(name: str, r: int, generator: Generator | None = None) -> Tensor:
    """Draw the initial M.

    Args:
        name: A key of ``MIXERS``.
        r: Rank.
        generator: Where random starts are drawn from; torch's default one if None.

    Returns:
        M, shape ``(r, r)``, float32, on the CPU.

    Raises:
        UsageError: If the mixer is unknown, cannot learn, or does not exist for this rank.
    """
    return find_mixer(name).fill(r, generator)


def draw_mixer(given: Tensor | Callable[..., Tensor], r: int, generator: Generator | None = None) -> Tensor:
    """Take the initial M from a user's tensor or callable, refusing what cannot be meant.

    Args:
        given: M itself, shape ``(r, r)``; or what makes it of the rank. A callable with a parameter named
            ``generator``, or with a second one without a default, is handed a CPU generator too. What it draws
            from torch's default generator does not advance that one, so A and B start as without it.
        r: Rank.
        generator: What random starts are drawn from; torch's default one if None.

    Returns:
        M, shape ``(r, r)``, float32 (float64 if it was given so), on the CPU.

    Raises:
        UsageError: If it is not a real matrix of this shape, is not finite, or is zero, from which nothing is learned.
    """
    found: object = given
    if not isinstance(given, Tensor):
        with torch.random.fork_rng(devices=[]):
            seed = torch.randint(2**62, (), generator=generator)
            torch.default_generator.manual_seed(int(seed))
            found = _call(given, r, generator)
    source = "mixer" if isinstance(given, Tensor) else f"mixer({r})"
    if not isinstance(found, Tensor):
        raise UsageError(
            f"{source} is a {type(found).__name__}; it must be a torch.Tensor of shape (r, r), or a callable that "
            "makes one of the rank r."
        )
    if found.is_complex() or found.is_meta or found.is_sparse or tuple(found.shape) != (r, r):
        raise UsageError(
            f"{source} is a {found.dtype} tensor of shape {tuple(found.shape)} on {found.device}; for rank {r} it must "
            f"be a dense real one of shape ({r}, {r}). A callable, r -> tensor, serves modules of different ranks."
        )
    dtype = found.dtype if found.dtype == torch.float64 else torch.float32
    M = found.detach().to("cpu", dtype, copy=True)
    if not torch.isfinite(M).all():
        raise UsageError(f"{source} has NaN or infinite values (as {dtype}); every entry must be a number.")
    if not M.any():
        raise UsageError(f"{source} is zero. {REFUSED['zeros']}")
    return M


def _call(given: Callable[..., Tensor], r: int, generator: Generator | None) -> object:
    """Call what makes a mixer, with the generator if it asks for one."""
    try:
        parameters = inspect.signature(given).parameters
    except (TypeError, ValueError):  # functions that are not written in Python do not say
        return given(r)
    if "generator" in parameters:
        return given(r, generator=generator)
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needs_second = len(positional) > 1 and positional[1].default is inspect.Parameter.empty
    return given(r, generator) if needs_second else given(r)


def forked_generator() -> Generator:
    """Make a generator that is seeded by torch's default one without advancing it.

    Mixers are drawn from it, so that with one seed A starts the same with and without a mixer: methods
    can be compared in pairs.

    Returns:
        A CPU generator.
    """
    ahead = Generator()
    ahead.set_state(torch.get_rng_state())
    seed = int(torch.randint(2**62, (), generator=ahead))
    return Generator().manual_seed(seed)


def mixed_norms(A: Tensor, M: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factor whose scale a mixer changes, and its norm before and after: A, ``‖A‖`` and ``‖M·A‖``.

    Where A starts at zero, as an embedding's does, it is B, ``‖B‖`` and ``‖B·M‖``.

    Args:
        A: Shape ``(..., r, in)``.
        M: Shape ``(..., r, r)``.
        B: Shape ``(..., out, r)``.

    Returns:
        The factor itself, and two norms of shape ``(..., 1, 1)``.
    """
    factor, mixed = (A, M @ A) if A.any() else (B, B @ M)
    before, after = (matrices.norm(dim=(-2, -1), keepdim=True) for matrices in (factor, mixed))
    return factor, before, after
