"""torch's tensors without values, and modes that see every operation. Seen in torch 2.6 to 2.13.

Import this module inside functions: it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["EveryTensor", "FakeTensorMode"]


class EveryTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls a function with every tensor that an operation makes inside the block.

    - Private modules: ``torch.utils._python_dispatch`` and ``torch.utils._pytree``, seen in torch 2.6 to 2.13; and
      ``torch._subclasses.fake_tensor``, whose ``FakeTensorMode`` this file passes on.
    - Without it: the memory of a step could only be measured by taking the step.
    - Can go: when torch documents these modes under public names.

    Args:
        on_tensor: Called with each tensor.
    """

    def __init__(self, on_tensor: Callable[[torch.Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_tensor = on_tensor

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.on_tensor(leaf)
        return result
