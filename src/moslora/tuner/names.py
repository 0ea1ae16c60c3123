"""The names of an adapter's parameters, and telling from one what it is.

…q_proj.moslora_A.ADAPTER.weight          of a linear layer or convolution, likewise M and B
…q_proj.moslora_B.ADAPTER.bias            of a bias on B
…embed_tokens.moslora_embedding_A.ADAPTER of an embedding, likewise M and B
"""

from __future__ import annotations

import re

__all__ = [
    "EMBEDDING_FACTORS",
    "FACTORS",
    "MAGNITUDE",
    "MAGNITUDE_IN_OLD_FILES",
    "PREFIX",
    "belongs_to",
    "factor_in",
    "is_bias_of_another",
]

PREFIX = "moslora_"
# What a layer holds A, M and B in.
FACTORS = ("moslora_A", "moslora_M", "moslora_B")
EMBEDDING_FACTORS = ("moslora_embedding_A", "moslora_embedding_M", "moslora_embedding_B")
# What it holds DoRA's magnitudes in. TRL spares trained parameters from its cast to bfloat16 whose names contain
# "lora_magnitude_vector", as this does.
MAGNITUDE = "moslora_magnitude_vector"
# What that was called in moslora 0.1.
MAGNITUDE_IN_OLD_FILES = "moslora_magnitude"

_FACTOR = re.compile(rf"\.{PREFIX}(?:embedding_)?([AMB])(?:\.|$)")


def factor_in(name: str) -> str | None:
    """Tell of which factor a parameter is a part.

    Args:
        name: Its name in a model or a file.

    Returns:
        ``"A"``, ``"M"`` or ``"B"`` (also for a bias on B); None if it is not a part of a factor.
    """
    match = _FACTOR.search(name)
    return None if match is None else match[1]


def belongs_to(name: str, adapter_name: str) -> bool:
    """Tell whether a parameter of a model belongs to an adapter: a factor, a start, a magnitude.

    Args:
        name: Its name in the model.
        adapter_name: The adapter's name.
    """
    return re.search(rf"\.{PREFIX}\w+\.{re.escape(adapter_name)}(\.|$)", name) is not None


def is_bias_of_another(name: str, adapter_name: str) -> bool:
    """Tell whether a parameter of a model is a bias on B of another adapter.

    Args:
        name: Its name in the model.
        adapter_name: The adapter's name.
    """
    others = rf"\.{FACTORS[2]}\.(?!{re.escape(adapter_name)}\.bias$).*\.bias$"
    return re.search(others, name) is not None
