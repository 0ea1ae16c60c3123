"""One table of tolerances, each with its reason. Nothing else in the tests may name one."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest absolute error, relative to the largest entry of what is compared.
RELATIVE = {
    # Two orders of summing up to a few thousand products: eps = 2e-16, grown by the length of the sums.
    torch.float64: 1e-13,
    # The same with eps = 1.2e-7.
    torch.float32: 5e-6,
}

# Signal-to-noise ratio in dB below which a low-precision result is wrong, not merely rounded.
# One rounding to 8 (11) bits of mantissa leaves about 52 (70) dB. Three chained products lose up to 12 dB of
# it; a dropped mixer or a wrong scale leaves less than 10 dB.
SNR_DB = {torch.bfloat16: 38.0, torch.float16: 56.0}

# Triton 3.9's interpreter cuts float32 off to bfloat16 where a GPU rounds it: twice the error (6 dB), all of one sign.
INTERPRETED_SNR_DB = SNR_DB | {torch.bfloat16: 32.0}

# Whole tiny models: some dozens of roundings, added as noise, leave up to 14 dB less than one does (52 and 70 dB),
# and 6 dB are for luck. In a model that routes tokens no bound holds, for rounding may send one elsewhere.
MODEL_SNR_DB = {torch.bfloat16: 32.0, torch.float16: 50.0}

# Whole tiny models in float32, merged against unmerged or folded against live: a few hundred roundings.
MODEL = 2e-5

# The same after a few steps of AdamW, which divides a gradient by its size: where that is mostly rounding, so is the
# step.
TRAINED = 50 * MODEL

# Losses and gradient norms of models that compute in bfloat16: roundings of 2**-9, some dozens of them added as noise.
LOW_TRAINED = 2**-6

# Shares of some thousand entries that moved: which do is a matter of their sizes, which are drawn, and their gradients.
SHARE = 0.02


# Two QRs, a singular value decomposition and three products in float64: some dozens of roundings of 2e-16, each
# relative to the norm of the whole.
SVD = 1e-13

# Pixels from -1 to 1 through the small world's autoencoder, which is the identity but for two group norms: each takes
# the deviation of ±128 for that of ±128 and the pixels, wrong by at most 3 ÷ (2 · 128²) = 9.2e-5, and SiLU is left at
# 30, where float32 has steps of 1.9e-6. A picture's own step is 7.8e-3.
PIXELS_THROUGH_IDENTITY = 2.5e-4


# Cosines of unit vectors taken in float64, of features of tiny models in float32: a dozen of layers of roundings of
# 6e-8, each relative to a vector of length one.
COSINE = 5e-6


def relative_error(found: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """Largest absolute error, relative to the largest entry of ``size``, or of ``expected``.

    Sums may cancel; ``size`` is then the same sum over absolute values.
    """
    found, expected = found.detach(), expected.detach()
    largest = (expected if size is None else size.detach()).abs().max()
    return float((found - expected).abs().max() / largest.clamp_min(torch.finfo(expected.dtype).tiny))


def snr_db(found: Tensor, expected: Tensor) -> float:
    """Signal-to-noise ratio of ``found``, taking ``expected`` as the truth, in decibel."""
    found, expected = found.detach(), expected.detach()
    noise = (found.double() - expected.double()).norm()
    return float("inf") if noise == 0 else float(20 * torch.log10(expected.double().norm() / noise))
