"""The kinds of model that the matrix is made of: small, random, and each with something to adapt."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import test_tuner_experts
import tiny
import tiny_pipelines
from moslora.compat.peft import quantization
from test_tuner_quantized import Packed, PackedBackend

ROWS = 3


class Blocks(nn.Module):
    """Two blocks and a head, with gradient checkpointing as transformers has it."""

    def __init__(self, first: nn.Module, block: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.first = first
        self.layers = nn.ModuleList(nn.ModuleDict({"core": block()}) for _ in range(2))
        self.head = nn.Linear(width, 5)
        core = self.layers[0]["core"]
        self.is_attending = isinstance(core, nn.MultiheadAttention)
        self.has_channels_first = isinstance(core, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        self.is_checkpointing = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        self.is_checkpointing = True

    def block(self, layer: nn.ModuleDict, x: Tensor) -> Tensor:
        if self.is_attending:
            return x + layer["core"](x, x, x)[0]
        return torch.tanh(layer["core"](x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            run = (
                partial(checkpoint, self.block, use_reentrant=False) if self.is_checkpointing else self.block
            )
            x = run(layer, x)
        return self.head(x.flatten(2).transpose(1, 2) if self.has_channels_first else x)


def blocks(
    block: Callable[[], nn.Module], first: Callable[[], nn.Module] = nn.Identity, width: int = 8
) -> Any:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Blocks(first(), block, width).eval()

    return build


def numbers(*shape: int) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3)
        return {"x": torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64).to(dtype)}

    return inputs


def token_ids(dtype: torch.dtype) -> dict[str, Any]:
    return {"input_ids": tiny.tokens(rows=ROWS, length=8)}


def uncached(dtype: torch.dtype) -> dict[str, Any]:
    return {**token_ids(dtype), "use_cache": False}


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        tie_word_embeddings=False,
        feed_forward_proj="gated-gelu",
    )
    return T5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        dropout=0.0,
        decoder_start_token_id=2,
    )
    return BartForConditionalGeneration(config).eval()


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=6,
        max_target_positions=16,
        dropout=0.0,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return WhisperForConditionalGeneration(config).eval()


def answered(dtype: torch.dtype) -> dict[str, Any]:
    """What a sequence-to-sequence model reads, and the beginning of its answer."""
    return {**uncached(dtype), "decoder_input_ids": tiny.tokens(rows=ROWS, length=5, seed=1)}


def heard(dtype: torch.dtype) -> dict[str, Any]:
    """A spectrogram, and the beginning of what was said."""
    found = answered(dtype)
    del found["input_ids"]
    return {**found, "input_features": numbers(8, 12)(dtype)["x"]}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    text = tiny.llama(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1
    ).config
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=63, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config).eval()


def image_and_text(dtype: torch.dtype) -> dict[str, Any]:
    """Four patches of 4 × 4, and a place in the text for each."""
    ids = tiny.tokens(rows=ROWS, length=10, vocab=60)
    ids[:, 1:5] = 63
    pixels = numbers(3, 8, 8)(dtype)["x"]
    return {"input_ids": ids, "pixel_values": pixels, "use_cache": False}


def unet() -> nn.Module:
    torch.manual_seed(0)
    return tiny_pipelines.sdxl_unet(layers=1).eval()


def noise(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "sample": numbers(4, 8, 8)(dtype)["x"],
        "timestep": torch.tensor(500),
        "encoder_hidden_states": numbers(8, 32)(dtype)["x"],
        "added_cond_kwargs": {
            "text_embeds": numbers(16)(dtype)["x"],
            "time_ids": numbers(6)(dtype)["x"],
        },
    }


def dequantized() -> nn.Module:
    """The same model with plain layers of the same weights: what LoRA is asked to adapt."""
    model = packed()
    for layer in model.layers:
        linear = nn.Linear(8, 8, bias=False)
        linear.weight.data = layer["core"].packed.float() / 64
        layer["core"] = linear
    return model


packed = blocks(lambda: Packed(nn.Linear(8, 8, bias=False)))


@contextlib.contextmanager
def packed_is_known() -> Iterator[None]:
    """Let the method find the backend of ``Packed``, as it finds PEFT's own."""
    backend = PackedBackend()

    def resolve(base_layer: nn.Module, **_: object) -> Any:
        return backend if isinstance(base_layer, Packed) else None

    with (
        mock.patch.object(quantization, "resolve_quantization_backend", resolve),
    ):
        yield


def once(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Build a model the first time and copy it after that; random numbers continue as if it had been built again."""

    @functools.cache
    def first() -> tuple[nn.Module, Tensor]:
        return build(), torch.get_rng_state()

    def copied() -> nn.Module:
        model, state = first()
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    return copied


@dataclass(frozen=True)
class Kind:
    """One column of the matrix.

    Attributes:
        build: Makes the base model, the same every time.
        inputs: Keyword arguments of a call for a dtype, ``ROWS`` rows.
        settings: What is adapted.
        pattern: A name of one adapted module (or parameter), for rank and alpha patterns.
        layers: The word before a layer's index.
        head: A module to train whole.
        dtype: Of the base.
        is_routed: Rounding may send a token to another expert, so that no bound on noise holds.
        reference: What LoRA is asked to adapt, where that differs.
        judge: Mends what PEFT's LoRA is known to do wrong.
        known: A context in which the kind can be adapted.
        unrounded: The model before it was quantized; merging rounds to the base's grid again.
        anew: ``build`` without the copying, for bases that are built without values.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    settings: dict[str, Any]
    pattern: str
    layers: str = "layers"
    head: str = "head"
    dtype: torch.dtype = torch.float32
    is_routed: bool = False
    reference: Callable[[], nn.Module] | None = None
    judge: Callable[[nn.Module], None] = lambda model: None
    known: Callable[[], contextlib.AbstractContextManager[None]] = field(default=contextlib.nullcontext)
    unrounded: Callable[[], nn.Module] | None = None
    anew: Callable[[], nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anew", self.build)
        object.__setattr__(self, "build", once(self.build))

    @property
    def is_quantized(self) -> bool:
        return self.unrounded is not None


def add_out_proj_once(lora: nn.Module) -> None:
    """Mend PEFT's LoRA, which adds out_proj's update twice: tests/test_tuner_attention.py has the proof."""
    for module in lora.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.out_proj.merge = module.out_proj.unmerge = lambda *args, **kwargs: None


def causal(build: Callable[[], nn.Module], targets: list[str], **changes: Any) -> Kind:
    values = {"pattern": targets[0], "head": "lm_head", "inputs": uncached, **changes}
    return Kind(build=build, settings={"target_modules": targets}, **values)


def mixture(name: str) -> Kind:
    settings = {"target_modules": ["q_proj"], "target_parameters": test_tuner_experts.BOTH}
    return Kind(
        build=lambda: test_tuner_experts.build(name),
        inputs=uncached,
        settings=settings,
        pattern="experts.down_proj",
        head="lm_head",
        is_routed=True,
    )


CORE = {"target_modules": ["core"]}
Q_V_DOWN = ["q_proj", "v_proj", "down_proj"]

# By the table of the page in which they stand.
KINDS: dict[str, dict[str, Kind]] = {
    "Layers": {
        "Linear": Kind(blocks(lambda: nn.Linear(8, 8)), numbers(4, 8), CORE, "core"),
        "Embedding": Kind(
            blocks(lambda: nn.Linear(8, 8), lambda: nn.Embedding(64, 8)),
            lambda dtype: {"x": tiny.tokens(rows=ROWS, length=4)},
            {"target_modules": ["first"]},
            "first",
        ),
        "Conv1d": Kind(blocks(lambda: nn.Conv1d(8, 8, 3, padding=1)), numbers(8, 6), CORE, "core"),
        "Conv2d": Kind(blocks(lambda: nn.Conv2d(8, 8, 3, padding=1)), numbers(8, 4, 4), CORE, "core"),
        "Conv3d": Kind(blocks(lambda: nn.Conv3d(8, 8, 3, padding=1)), numbers(8, 3, 3, 3), CORE, "core"),
        "Conv2d, groups": Kind(
            blocks(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2)), numbers(8, 4, 4), CORE, "core"
        ),
        "Multihead-Attention": Kind(
            blocks(lambda: nn.MultiheadAttention(8, 2, batch_first=True)),
            numbers(4, 8),
            CORE,
            "core",
            judge=add_out_proj_once,
        ),
        "quantized": Kind(
            packed,
            numbers(4, 8),
            CORE,
            "core",
            reference=dequantized,
            known=packed_is_known,
            unrounded=blocks(lambda: nn.Linear(8, 8, bias=False)),
        ),
    },
    "Language models": {
        "Llama": causal(tiny.llama, Q_V_DOWN),
        "GPT-2 (Conv1D)": causal(tiny.gpt2, ["c_attn", "c_proj"], layers="h"),
        "T5": causal(t5, ["q", "v", "wi_1"], layers="block", inputs=answered),
        "BERT": causal(
            bert, ["query", "value", "dense"], layers="layer", head="classifier", inputs=token_ids
        ),
        "Llama, bf16": causal(lambda: tiny.llama().bfloat16(), Q_V_DOWN, dtype=torch.bfloat16),
        "Llama, fp16": causal(lambda: tiny.llama().half(), Q_V_DOWN, dtype=torch.float16),
        "tied embedding": causal(
            lambda: tiny.llama(tie_word_embeddings=True), ["embed_tokens", "q_proj"], head="norm"
        ),
    },
    "Sequence to sequence, speech": {
        "BART": causal(bart, ["q_proj", "v_proj", "fc1"], inputs=answered, head="layernorm_embedding"),
        "Whisper": causal(whisper, ["q_proj", "v_proj", "fc1"], inputs=heard, head="layer_norm"),
    },
    "Mixtures of experts, images": {
        "Mixtral": mixture("mixtral"),
        "Qwen3-MoE": mixture("qwen3-moe"),
        "gpt-oss": mixture("gpt-oss"),
        "SDXL U-Net": Kind(
            unet,
            noise,
            {"target_modules": ["to_q", "to_v", "to_out.0", "conv1", "proj_in"]},
            "to_q",
            layers="transformer_blocks",
            head="conv_out",
        ),
        "Llava": causal(llava, ["q_proj", "v_proj", "linear_1"], inputs=image_and_text),
    },
}
ALL = {name: kind for group in KINDS.values() for name, kind in group.items()}
