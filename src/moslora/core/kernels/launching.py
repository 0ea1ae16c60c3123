"""In which configuration each program runs, and launching it.

``KERNELS`` has the configurations of each program. Where timing is allowed Triton chooses among them, once for each
size; else the first one that fits into the shared memory of every GPU is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moslora.core.kernels.programs import (
    HAS_TRITON,
    INTERPRETED,
    cross_kernel,
    down_kernel,
    joint_kernel,
    linear_kernel,
    sum_kernel,
    up_kernel,
)

if HAS_TRITON:  # whatever names it below runs with it alone
    import triton

__all__ = [
    "KERNELS",
    "Kernel",
    "bucket_of",
    "cdiv",
    "chunk_of",
    "is_fused_faster",
    "launch",
    "padded",
    "precision",
    "sum_parts",
]

LARGEST_BLOCK = 256  # chunks of a split sum are multiples of it
SHARED_BYTES = 96 * 1024  # what consumer GPUs have, too


@dataclass(frozen=True)
class Kernel:
    """A kernel, the configurations it may run in, best guess first, and what it takes of shared memory."""

    function: Any
    names: tuple[str, ...]
    configs: tuple[tuple[int, ...], ...]  # block sizes as named, then warps, then pipeline stages
    shared: Callable[..., int] = lambda **_: 0  # in elements
    key: tuple[str, ...] = ("bucket", "N", "R", "DROPOUT")
    restore: tuple[str, ...] = ()
    tuned: dict[int, Any] = field(default_factory=dict)

    def fitting(self, R: int, itemsize: int) -> list[tuple[dict[str, int], int, int]]:
        """Return block sizes, warps and stages of each configuration that fits every GPU's shared memory."""
        found = []
        for *sizes, warps, stages in self.configs:
            blocks = dict(zip(self.names, sizes, strict=True))
            if self.shared(R=R, stages=stages, **blocks) * itemsize <= SHARED_BYTES:
                found.append((blocks, warps, stages))
        return found

    def timed(self) -> Any:
        """Return the kernel with Triton's own choice among all configurations, made when first asked for."""
        if 0 not in self.tuned:
            configs = [
                triton.Config(dict(zip(self.names, sizes, strict=True)), num_warps=warps, num_stages=stages)
                for *sizes, warps, stages in self.configs
            ]
            self.tuned[0] = triton.autotune(
                configs, key=list(self.key), restore_value=list(self.restore) or None, do_bench=_bench
            )(self.function)  # fmt: skip
        return self.tuned[0]


def _bench(call: Callable[[], Any], quantiles: Any) -> Any:
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


_TILES = ("BT", "BN")
KERNELS = {
    "down": Kernel(
        down_kernel, _TILES,
        ((64, 128, 4, 3), (32, 128, 4, 4), (64, 64, 4, 4), (128, 64, 8, 4), (32, 64, 4, 3), (16, 32, 4, 2)),
        lambda BT, BN, R, stages: (BT + R) * BN * stages,
    ),
    "up": Kernel(
        up_kernel, _TILES,
        ((64, 128, 4, 1), (128, 128, 8, 1), (64, 256, 8, 1), (32, 128, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
        lambda BT, BN, R, stages: (BT + BN) * R + BT * BN * 2,
        restore=("out",),  # it accumulates in place, and timing repeats it
    ),
    "linear": Kernel(
        linear_kernel, ("BT", "BN", "BK", "GROUP"),
        ((128, 256, 64, 8, 8, 3), (128, 256, 64, 8, 8, 4), (128, 128, 64, 8, 4, 4), (128, 128, 64, 8, 8, 3),
         (64, 256, 64, 8, 8, 3), (64, 128, 64, 8, 4, 3), (64, 64, 32, 8, 4, 3), (32, 32, 32, 8, 4, 2)),
        lambda BT, BN, BK, GROUP, R, stages: (BT + BN) * max(BK * stages, R),
        key=("bucket", "N", "K", "R", "DROPOUT"),
    ),
    "cross": Kernel(
        cross_kernel, _TILES,
        ((64, 128, 4, 3), (32, 128, 4, 4), (64, 64, 4, 4), (128, 64, 8, 3), (32, 64, 4, 3), (16, 32, 4, 2)),
        lambda BT, BN, R, stages: BT * (BN + R) * stages,
    ),
    "joint": Kernel(
        joint_kernel, ("BT",),
        ((64, 8, 2), (32, 8, 3), (64, 8, 3), (32, 4, 2), (16, 4, 2)),
        lambda BT, R, stages: BT * (256 + R) * stages + 256 * R,
        key=("bucket", "N", "R"),
    ),
    "sum": Kernel(sum_kernel, ("BLOCK",), ((512, 4, 1),)),
}  # fmt: skip


def _may_time() -> bool:
    return not (
        INTERPRETED
        or torch.are_deterministic_algorithms_enabled()
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
    )


def launch(
    name: str, grid: Callable[[dict[str, int]], tuple[int, ...]], itemsize: int, **arguments: Any
) -> None:
    """Run one kernel. Every launch goes through here.

    Args:
        name: A key of ``KERNELS``.
        grid: Returns the number of programs along each dimension from the block sizes.
        itemsize: Bytes of one entry of the input, which decide what fits into shared memory.
        **arguments: The kernel's arguments but for block sizes.
    """
    kernel = KERNELS[name]
    if len(kernel.configs) > 1 and _may_time():
        kernel.timed()[grid](**arguments, enable_fp_fusion=True)  # Triton 3.10 changes the default
        return
    blocks, warps, stages = kernel.fitting(arguments.get("R", 16), itemsize)[-1 if INTERPRETED else 0]
    kernel.function[grid(blocks)](
        **arguments, **blocks, num_warps=warps, num_stages=stages, enable_fp_fusion=True
    )


def cdiv(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return -(-a // b)


def padded(r: int) -> int:
    """Return the ranks of a tile: a power of two, and 16 at least, which the matrix units need."""
    return max(16, 1 << (r - 1).bit_length())


def bucket_of(T: int) -> int:
    """Return the power of two up to which token counts share a configuration, so that few lengths are timed."""
    return 1 << (T - 1).bit_length()


def precision(dtype: torch.dtype) -> str:
    """Return Triton's name for the precision of products; 16-bit dtypes ignore it."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8


def chunk_of(length: int, blocks: int, x: Tensor, least: int) -> int:
    """Split ``length`` so that ``blocks`` programs times the splits fill the device twice, ``least`` to a split."""
    least = LARGEST_BLOCK if INTERPRETED else least
    splits = max(1, min(2 * _processors(x) // max(blocks, 1), cdiv(length, least)))
    return cdiv(cdiv(length, splits), LARGEST_BLOCK) * LARGEST_BLOCK


def sum_parts(parts: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return ``scale`` times the sum of ``parts`` over its first dimension, in a fixed order."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    launch(
        "sum", lambda meta: (cdiv(out.numel(), meta["BLOCK"]),), 4,
        parts=parts, out=out, splits=parts.shape[0], size=out.numel(), scale=scale, bucket=1,
    )  # fmt: skip
    return out


_faster: dict[tuple[Any, ...], bool] = {}


def is_fused_faster(key: tuple[Any, ...], fused: Callable[[], Any], separate: Callable[[], Any]) -> bool:
    """Time one kernel against the base's own product and a pass over its output, once per size."""
    if not _may_time():
        return False
    if key not in _faster:
        one, two = (
            triton.testing.do_bench(f, warmup=5, rep=20, return_mode="median") for f in (fused, separate)
        )
        _faster[key] = one < two
    return _faster[key]
