"""Stand-ins for layers that bitsandbytes stores in 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


# bitsandbytes' 4-bit storage: half a byte, and a float32 for each block of 64; or, of two levels, one byte for each
# block and a float32 for each 256 blocks.
FOUR_BITS = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}


def quantize_linears(adapted: nn.Module, model: Any, double: bool, skipped: tuple[str, ...]) -> None:
    """Put stand-ins for 4-bit layers in the place of linear layers, but for the output head."""
    from torch import nn

    head = model.get_output_embeddings()
    for name, module in list(adapted.named_modules()):
        for place, child in list(module.named_children()):
            is_ours = place != "base_layer" and "moslora_" in name  # a factor
            whole = f"{name}.{place}"
            if (
                type(child) is nn.Linear
                and child is not head
                and not is_ours
                and not any(part in whole for part in skipped)
            ):
                setattr(module, place, _four_bit(child, double))


def _four_bit(linear: nn.Linear, double: bool) -> nn.Module:
    """Make what stands for a linear layer in bitsandbytes' 4 bits: its bytes, and what it makes and keeps."""
    import torch
    from torch import nn

    class Product(torch.autograd.Function):
        """As bitsandbytes multiplies: the weight is dequantized in both passes and never kept."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            weight = torch.empty(linear.out_features, linear.in_features, dtype=x.dtype, device=x.device)
            return nn.functional.linear(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, G: torch.Tensor) -> tuple[torch.Tensor, None]:
            weight = torch.empty(linear.out_features, linear.in_features, dtype=G.dtype, device=G.device)
            return G @ weight, None

    class FourBit(nn.Module):
        """Half a byte a weight, and the scales of blocks."""

        def __init__(self) -> None:
            super().__init__()
            size = round(linear.weight.numel() * FOUR_BITS[double])
            packed = torch.empty(size, dtype=torch.uint8, device=linear.weight.device)
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.stands_for = linear.weight.numel()
            self.in_features, self.out_features, self.bias = (
                linear.in_features,
                linear.out_features,
                linear.bias,
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Product.apply(x, self.bias)  # type: ignore[no-untyped-call, no-any-return]

    return FourBit()
