"""diffusers' reader of LoRA files. Seen in diffusers 0.38.

This file imports nothing at import time, so that every floor may use it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["lora_config_of"]


def lora_config_of(tensors: Any, alphas: Any, metadata: Any, ranks: Any) -> Any:
    """Return the ``LoraConfig`` that diffusers makes of a file's tensors.

    - Private: ``diffusers.utils.peft_utils._create_lora_config``, seen in diffusers 0.38.
    - Without it: an exported file could be proven only by what this package believes that diffusers reads.
    - Can go: when diffusers has a public function for it.

    Args:
        tensors: By PEFT's names.
        alphas: Alphas by name, or None.
        metadata: The file's metadata, or None.
        ranks: Ranks by name.
    """
    from diffusers.utils import peft_utils

    return peft_utils._create_lora_config(tensors, alphas, metadata, ranks, is_unet=False)
