"""Adapted embeddings: A holds one column per token, so its columns are looked up, not multiplied."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moslora.errors import UsageError
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.names import EMBEDDING_FACTORS
from moslora.tuner.reading import check_present

__all__ = ["MoSLoRAEmbedding"]


class MoSLoRAEmbedding(MoSLoRALayer):
    """An embedding with ``ΔWᵀ = s·B·M·A`` beside its weight: A ``(r, vocab)``, M ``(r, r)``, B ``(dim, r)``.

    As in LoRA, A starts at zero and B as embeddings do, and dropout has no part in it: its input is token
    ids. Where the base multiplies its rows by an ``embed_scale`` (Gemma), the update is multiplied too.
    """

    adapter_layer_names = EMBEDDING_FACTORS
    container = nn.ParameterDict
    quantized_kind = "embedding"
    fan_in_fan_out = True  # the weight lies as (vocab, dim), and a magnitude is one for each of dim
    has_droppable_input = False

    def _check_adapter(self, r: int, config: MoSLoRAConfig) -> None:
        max_norm = self.get_base_layer().max_norm
        if max_norm is not None:
            raise UsageError(
                f"An embedding with max_norm={max_norm} rewrites its rows as they are read, so what is read "
                "beside it would not be what merging gives. Set max_norm=None on the embedding, leave the "
                "module out, or train it whole through modules_to_save."
            )

    def make_factors(self, adapter_name: str, r: int, has_bias: bool) -> None:
        """Put A, M and B in their places."""
        A = torch.randn(r, self.in_features)  # drawn as LoRA draws it, so that later layers start the same
        B = torch.randn(self.out_features, r)
        self._hold(adapter_name, nn.Parameter(A), nn.Parameter(A.new_empty(r, r)), nn.Parameter(B))

    def _start_like_lora(self, adapter_name: str, config: MoSLoRAConfig) -> None:
        A, _, B = self.held_factors(adapter_name)
        if config.init_lora_weights:
            nn.init.zeros_(A)
            nn.init.normal_(B)

    def lay(self, delta: Tensor) -> Tensor:
        """Return ΔW in the shape of the base weight."""
        return delta.T  # (vocab, dim)

    def why_no_bias(self) -> str | None:
        """Return why B cannot have a bias in this layer."""
        return "its B is a parameter with no module around it, in LoRA too"

    def why_no_magnitude(self) -> str | None:
        """Return None: this layer can have DoRA's magnitude."""
        return None

    def _update(self, x: Tensor, name: str) -> Tensor:
        return self.low_rank(x, name)

    def low_rank(self, x: Tensor, name: str) -> Tensor:
        """Return ``s·B·M·A`` of the tokens x, shape ``(..., dim)``."""
        base = self.get_base_layer()
        A, M, B, scale = self.factors(name)
        check_present(x, A, M, B)
        # Looked up first and mixed after, because a batch has fewer tokens than the vocabulary. The base's
        # ``sparse`` is left out: a sparse gradient of the transposed A does not exist in torch.
        H = F.embedding(
            x,
            A.T,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )  # (..., r)
        update = (H.to(M.dtype) @ M.T @ B.to(M.dtype).T) * scale  # (..., dim)
        embed_scale = self._get_embed_scale()
        return update if embed_scale is None else update * embed_scale.to(update.dtype)
