"""transformers' loader of GGUF files. Seen in transformers 4.57 to 5.23.

This file imports nothing at import time, so that every floor may use it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

__all__ = ["no_gguf_bar"]


@contextlib.contextmanager
def no_gguf_bar() -> Iterator[None]:
    """Switch off the progress bar of the GGUF loader inside the block.

    - Changed and put back: ``transformers.modeling_gguf_pytorch_utils.tqdm``, seen in transformers 4.57 to 5.23.
    - Without it: the loader, which takes its bar from tqdm itself, draws it whatever transformers' own switch says.
    - Can go: when the loader asks ``transformers.utils.logging`` for its bar.
    """
    from transformers import modeling_gguf_pytorch_utils as loader

    bar = getattr(loader, "tqdm", None)
    if bar is not None:
        loader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        if bar is not None:
            loader.tqdm = bar
