"""What does an adapted layer ask of a GPU? Counted, without one.

One linear layer runs forward and backward on tensors without values, under a mode that sees every operation
that torch dispatches. Counted are operations that a GPU would launch (views and empty memory launch nothing), the bytes
that they read and write (each operand once, whatever a cache holds), what is kept for the backward pass beside
parameters and the layer's input, and requests for a value, each of which would wait for the device (on tensors without
values they are errors, so there are none). The frozen layer's own are taken off. What a GPU makes of it is not said:
a product of rank 16 and one of full width are one launch each.

    python benchmarks/launches.py [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from moslora import MoSLoRAConfig
from moslora.files import write_text

FEATURES, TOKENS, RANK = 4096, 8192, 16
SMALLER = 8  # times, where values are needed
# Operations that only look at memory in another way, or take some.
FREE = frozenset({
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
    "lift_fresh", "new_empty", "new_empty_strided", "permute", "promote_types", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
})  # fmt: skip


@dataclass
class Counts:
    """What one pass forward and backward takes.

    Attributes:
        launches: Operations.
        bytes: What they read and write.
        kept: Bytes for the backward pass.
    """

    launches: int = 0
    bytes: int = 0
    kept: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.launches - other.launches, self.bytes - other.bytes, self.kept - other.kept)


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count what is dispatched while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.seen = Counts(), list[str]()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name.removeprefix("aten::")
        if name not in FREE and not name.startswith("prim"):
            self.counts.launches += 1
            self.seen.append(name)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.counts.bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return result


class DequantizedLinear(nn.Module):
    """In a quantized layer's place: of another class than ``nn.Linear``, and without a weight to multiply with."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.held = [linear.weight.detach()]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, as after dequantizing; how that is done is the library's."""
        return nn.functional.linear(x, self.held[0])


@dataclass(frozen=True)
class Case:
    """A way to run a layer.

    Attributes:
        factors: Their dtype.
        dropout: Probability.
        dora: Whether there is a magnitude.
        base: ``plain`` or ``quantized``.
        autocast: Whether bfloat16 autocast is on, over a float32 base.
        checkpointed: Whether the layer is run again for its backward pass.
    """

    factors: str = "float32"
    dropout: float = 0.0
    dora: bool = False
    base: str = "plain"
    autocast: bool = False
    checkpointed: bool = False


CASES = [
    Case(),
    Case(factors="bfloat16"),
    Case(dropout=0.05),
    Case(factors="bfloat16", dropout=0.05),
    Case(base="quantized"),
    Case(base="quantized", factors="bfloat16"),
    Case(base="quantized", dropout=0.05),
    Case(dora=True),
    Case(dora=True, factors="bfloat16"),
    Case(dora=True, dropout=0.05),
    Case(autocast=True),
    Case(checkpointed=True),
    Case(checkpointed=True, dropout=0.05),
]


def adapted(config: Any, case: Case, device: str, features: int) -> nn.Module:
    """Make a frozen layer, adapted where a configuration is given."""
    dtype = torch.float32 if case.autocast else torch.bfloat16
    with torch.device(device):
        linear = nn.Linear(features, features, bias=False, dtype=dtype)
        model: nn.Module = nn.Sequential(linear).requires_grad_(False)
        if config is not None:
            model = get_peft_model(model, config).train()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "magnitude" not in name:
                    parameter.data = parameter.data.to(getattr(torch, case.factors))
    if case.base == "quantized":
        holder: Any = model if config is None else model.base_model.model  # type: ignore[union-attr]
        if config is None:
            holder[0] = DequantizedLinear(holder[0])
        else:
            holder[0].base_layer = DequantizedLinear(holder[0].base_layer)
    return model


@contextlib.contextmanager
def keeping(counts: Counts, spared: set[int]) -> Iterator[None]:
    """Add up what is kept for the backward pass, but for memory of ``spared``."""
    seen = set(spared)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            counts.kept += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def count(config: Any, case: Case) -> tuple[Counts, list[str]]:
    """Count one layer's pass forward and backward.

    Args:
        config: The adapter's; None for the frozen layer.
        case: How it is run.

    Returns:
        The counts, and the operations in their order.
    """
    # Autocast knows no ``meta``, and a layer there has no weight to take norms of.
    device, tokens, features = "meta", TOKENS, FEATURES
    if case.autocast or case.dora:
        device, tokens, features = "cpu", TOKENS // SMALLER, FEATURES // SMALLER
    model = adapted(config, case, device, features)
    wide = torch.float32 if case.autocast else torch.bfloat16
    x = torch.empty(tokens, features, device=device, dtype=wide, requires_grad=True)
    cotangent = torch.empty(tokens, features, device=device, dtype=torch.bfloat16)
    run: Callable[[Tensor], Tensor] = model
    if case.checkpointed:
        # The state of random numbers is nothing that ``meta`` has; keeping it is no operation.
        run = lambda x: checkpoint(model, x, use_reentrant=False, preserve_rng_state=False)  # noqa: E731
    run(x)  # a mixer in 16 bits is split once
    counting = Counting()
    spared = {tensor.untyped_storage()._cdata for tensor in (x, *model.parameters())}
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if case.autocast else contextlib.nullcontext()
    kept = contextlib.nullcontext() if case.checkpointed else keeping(counting.counts, spared)
    with counting, dropout_of_a_gpu():
        with autocast, kept:
            out = run(x)
        out.backward(cotangent)
    return counting.counts, counting.seen


@contextlib.contextmanager
def dropout_of_a_gpu() -> Iterator[None]:
    """Let ``nn.Dropout`` do what it does on a GPU: one operation forward and one backward, not a mask and products."""
    its_own = nn.functional.dropout

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else its_own(x, p, training, inplace)

    nn.functional.dropout = dropout
    try:
        yield
    finally:
        nn.functional.dropout = its_own


def compare(case: Case) -> dict[str, Any]:
    """Count all contenders of a case, beside the frozen layer."""
    settings = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": case.dropout,
        "target_modules": ["0"],
        "use_dora": case.dora,
    }
    floor, _ = count(None, case)
    row: dict[str, Any] = {**asdict(case), "frozen": asdict(floor)}
    for name, config in (("PEFT LoRA", LoraConfig(**settings)), ("MoSLoRA", MoSLoRAConfig(**settings))):
        counts, seen = count(config, case)
        row[name] = {**asdict(counts - floor), "operations": seen}
    return row


def main() -> None:
    """Count, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "launches.json")
    parser.add_argument("--show", action="store_true", help="print the operations, too")
    wanted = parser.parse_args()
    rows = [compare(case) for case in CASES]
    for case, row in zip(CASES, rows, strict=True):
        print(case)
        for name in ("PEFT LoRA", "MoSLoRA"):
            found = row[name]
            megabytes, kept = found["bytes"] / 1e6, found["kept"] / 1e6
            print(f"  {name:<10} {found['launches']:4} launches {megabytes:9.1f} MB {kept:7.1f} MB kept")
            if wanted.show:
                print("     ", " ".join(found["operations"]))
    from moslora.training.provenance import collect_versions

    record = {
        "question": (__doc__ or "").splitlines()[0],
        "layer": {"in": FEATURES, "out": FEATURES, "tokens": TOKENS, "rank": RANK, "base": "bfloat16"},
        "rows": rows,
        "versions": collect_versions(),
    }
    write_text(wanted.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
