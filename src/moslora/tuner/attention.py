"""Adapted ``nn.MultiheadAttention``, and keeping torch's own shortcuts from passing adapters by.

torch reads the weights of an attention's projections itself, without calling a module, so for the length of a
call they are replaced by W + ΔW.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from moslora.tuner import bias, dora, starts
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.layer import MoSLoRALayer, MoSLoRALinear
from moslora.tuner.reading import check_present, replaced, whole

__all__ = ["MoSLoRAAttention", "leave_fast_paths", "restore_fast_paths"]


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
        **kwargs: What PEFT says about quantisation.

    Raises:
        ValueError: If query, key and value have projections of their own.
    """

    is_rowwise = False  # W + ΔW is built once for the whole batch

    def _sizes(self) -> tuple[int, int]:
        base = self.get_base_layer()
        if base.in_proj_weight is None:
            raise ValueError(
                f"A MultiheadAttention with kdim={base.kdim}, vdim={base.vdim} and embed_dim={base.embed_dim} "
                "has three separate projections, for which LoRA's files have no names. Leave the module out of "
                "target_modules, or train it whole through modules_to_save."
            )
        return base.embed_dim, 3 * base.embed_dim

    def _check_adapter(self, r: int, config: MoSLoRAConfig) -> None:
        if config.lora_dropout:
            warnings.warn(
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

    _make_factors = MoSLoRALinear._make_factors

    def _lay(self, delta: Tensor) -> Tensor:
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
        """Tell why B cannot have a bias in this layer."""
        return "PEFT's LoRA leaves the one of in_proj out without a word, so no reader would run the adapter"

    def why_unlike_lora(self) -> str | None:
        """Tell why PEFT's LoRA of this layer computes another output from the same factors."""
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
            active = [] if layer._is_base_alone() else layer._active_here()
            if active:
                weight = layer.get_base_weight()
                check_present(weight, *(factor for a in active for factor in layer.factors(a)[:3]))
                if getattr(module, "bias", None) is not None:
                    weights[module, "bias"] = whole(
                        module, "bias"
                    )  # offloaded, for nothing calls an out_proj
                weights[module, name] = (weight + sum(map(layer.get_delta_weight, active))).to(weight.dtype)
        if not weights:
            return self.base_layer(*args, **kwargs)
        with replaced(weights):
            return self.base_layer(*args, **kwargs)

    def _weight_beside(self) -> Tensor:
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


def _be_called(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Do nothing: a layer with a hook is one whose modules torch calls, and does not reach around."""


def leave_fast_paths(model: nn.Module) -> None:
    """Make torch's encoder layers call their modules where one of them is adapted.

    In evaluation ``nn.TransformerEncoderLayer`` hands the weights it finds to one kernel. It would find the
    base's, and leave the adapters out without a word (as it does with PEFT 0.21's LoRA).

    Args:
        model: The adapted model; hooks that do nothing are put on its encoder layers.
    """
    for module in model.modules():
        if not any(isinstance(part, MoSLoRALayer) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            # Only the kernel understands nested tensors. None is as good as False, and remembers the True.
            setattr(module, "use_nested_tensor", None)  # noqa: B010  declared as a bool
        hooks = module._forward_pre_hooks.values()
        if isinstance(module, nn.TransformerEncoderLayer) and _be_called not in hooks:
            module.register_forward_pre_hook(_be_called)


def restore_fast_paths(model: nn.Module) -> None:
    """Take back what ``leave_fast_paths`` did.

    Args:
        model: The model without adapters.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor is None:
            module.use_nested_tensor = True
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _be_called:
                del module._forward_pre_hooks[key]
