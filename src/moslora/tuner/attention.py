"""Adapted ``nn.MultiheadAttention``.

torch reads the weights of an attention's projections itself, without calling a module, so for the length of a
call they are replaced by W + ΔW.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moslora.errors import UsageError
from moslora.terminal import warn
from moslora.tuner import bias, dora, starts
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.linear import MoSLoRALinear
from moslora.tuner.reading import check_present, replaced, whole

__all__ = ["MoSLoRAAttention"]


class MoSLoRAAttention(MoSLoRALayer):
    """An ``nn.MultiheadAttention`` with an update beside each of its two projections, as PEFT's LoRA has it.

    This layer holds the factors of ``in_proj``: A ``(r, embed)``, M ``(r, r)``, B ``(3 · embed, r)`` for query,
    key and value together. ``out_proj`` becomes a ``MoSLoRALinear`` of its own, inside the base layer, and is
    merged and switched as such. W + ΔW has the dtype of W, so in a low-precision base the update is rounded
    as merging would round it.

    Args:
        base_layer: The attention.
        adapter_name: The first adapter's name.
        config: Its configuration.
        r: Its rank in both projections.
        lora_alpha: Its alpha in both projections.
        **kwargs: What PEFT says about quantization.

    Raises:
        ValueError: If query, key and value have projections of their own.
    """

    is_rowwise = False  # W + ΔW is built once for the whole batch

    def _sizes(self) -> tuple[int, int]:
        base = self.get_base_layer()
        if base.in_proj_weight is None:
            raise UsageError(
                f"A MultiheadAttention with kdim={base.kdim}, vdim={base.vdim} and embed_dim={base.embed_dim} "
                "has three separate projections, for which LoRA's files have no names. Leave the module out of "
                "target_modules, or train it whole through modules_to_save."
            )
        return base.embed_dim, 3 * base.embed_dim

    def _check_adapter(self, r: int, config: MoSLoRAConfig) -> None:
        if config.lora_dropout:
            warn(
                f"lora_dropout={config.lora_dropout} does nothing in a MultiheadAttention: its updates are added "
                "to the weights, so there is no input to drop from.",
                stacklevel=2,
            )

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: MoSLoRAConfig, **kwargs: Any
    ) -> None:
        """Add an adapter to both projections, or start it anew.

        Args:
            adapter_name: Its name.
            r: Rank in both projections.
            lora_alpha: Alpha in both projections.
            config: Everything that does not differ between layers.
            **kwargs: Ignored; PEFT hands over more than is needed.
        """
        starts.check(self, config)
        dora.check(self, config)
        bias.check(self, config)  # all three before the attention is changed
        base = self.get_base_layer()
        if not isinstance(base.out_proj, MoSLoRALinear):
            base.out_proj = MoSLoRALinear(base.out_proj, adapter_name, config, r, lora_alpha)
        super().update_layer(adapter_name, r, lora_alpha, config)
        # After in_proj, and again where it was just made: PEFT's LoRA draws its starts so.
        base.out_proj.update_layer(adapter_name, r, lora_alpha, config)

    make_factors = MoSLoRALinear.make_factors

    def lay(self, delta: Tensor) -> Tensor:
        """Return ΔW in the shape of the base weight."""
        return delta

    def get_base_weight(self) -> Tensor:
        """Return the weight of ``in_proj``, shape ``(3 · embed, embed)``."""
        return whole(self.get_base_layer(), "in_proj_weight").detach()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Put values into the weight of ``in_proj``."""
        self.get_base_layer().in_proj_weight.data = weight_data

    def __getattr__(self, name: str) -> Any:
        """Find what torch's own layers read from an attention (``batch_first``, ``num_heads``, …) in the base."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def why_no_bias(self) -> str | None:
        """Return why B cannot have a bias in this layer."""
        return "PEFT's LoRA leaves the one of in_proj out without a word, so no reader would run the adapter"

    def why_unlike_lora(self) -> str | None:
        """Return why stock PEFT's LoRA would compute another output with these weights."""
        return (
            "PEFT up to 0.21 adds the update of a MultiheadAttention's out_proj twice (its pull request 3774)"
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention with W + ΔW in the place of its projections' weights.

        Args:
            *args: Handed to the attention.
            **kwargs: Handed to the attention.

        Returns:
            What the attention returns: the output, and its weights if they were asked for.
        """
        base = self.get_base_layer()
        projections: tuple[tuple[MoSLoRALayer, nn.Module, str], ...] = (
            (self, base, "in_proj_weight"),
            (base.out_proj, base.out_proj.get_base_layer(), "weight"),
        )
        weights: dict[tuple[nn.Module, str], Tensor] = {}
        for layer, module, name in projections:
            active = [] if layer.is_base_alone() else layer.active_here()
            if active:
                weight = layer.get_base_weight()
                check_present(weight, *(factor for a in active for factor in layer.factors(a)[:3]))
                if getattr(module, "bias", None) is not None:
                    # It may be offloaded, because nothing calls an out_proj.
                    weights[module, "bias"] = whole(module, "bias")
                weights[module, name] = (weight + sum(map(layer.get_delta_weight, active))).to(weight.dtype)
        if not weights:
            return self.base_layer(*args, **kwargs)
        with replaced(weights):
            return self.base_layer(*args, **kwargs)

    def weight_beside(self) -> Tensor:
        """Return the base parameter in whose group a sharded model has the start of a mixer."""
        return self.get_base_layer().in_proj_weight  # type: ignore[no-any-return]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the attention without its adapters; PEFT calls this for what is nested.

        Args:
            merge: Add ΔW into the weights first.
            safe_merge: Refuse to write NaN or infinite values.
            adapter_names: Which adapters; the active ones if None.

        Raises:
            ValueError: If ``safe_merge`` found NaN or infinite values.
        """
        base: nn.MultiheadAttention = self.get_base_layer()
        out_proj: Any = base.out_proj
        if merge:
            self.merge(safe_merge, adapter_names)
            out_proj.merge(safe_merge, adapter_names)
        base.out_proj = out_proj.get_base_layer()
        return base
