"""State that transformers and DeepSpeed share in a process. Seen in transformers 5.23 and DeepSpeed 0.19.

This file imports nothing at import time, so that every floor may use it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = ["meet_for_deepspeed", "unsplit"]


def meet_for_deepspeed() -> None:
    """Let DeepSpeed find the processes that have met already.

    - Public: ``deepspeed.init_distributed``, seen in DeepSpeed 0.19.
    - Without it: a model that is loaded for ZeRO-3 is split as if this process were alone, and refused for its batch.
    - Can go: when transformers calls it on a CPU, as it does on a GPU.
    """
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


@contextlib.contextmanager
def unsplit() -> Iterator[None]:
    """Make models as a process alone does, also while one is trained under ZeRO-3.

    - Private: ``transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref``, seen in 4.57 to 5.23.
    - Without it: transformers splits every model that it makes, as a skeleton without weights, and waits for processes
      that make none.
    - Can go: when transformers takes this as an argument.
    """
    module = sys.modules.get("transformers.integrations.deepspeed")
    if module is None:
        yield
        return
    kept, module._hf_deepspeed_config_weak_ref = module._hf_deepspeed_config_weak_ref, None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module._hf_deepspeed_config_weak_ref = kept  # type: ignore[attr-defined]
