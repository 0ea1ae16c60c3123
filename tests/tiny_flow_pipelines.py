"""Small random pipelines of the families that are trained by flow matching with a language model for their words."""

from __future__ import annotations

from typing import Any

import torch

import tiny
from tiny_pipelines import _quiet, sd3

__all__ = ["FLOW_PIPELINES", "flux2", "klein", "lumina2", "qwen_image", "sana", "z_image"]

# As Qwen's and Mistral's, for contents that are text or a list of parts.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LANGUAGE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer() -> Any:
    """A byte-level tokenizer with a chat template, one token a byte."""
    made = tiny.tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return made


def scheduler(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def vae(channels: int, blocks: int = 1) -> Any:
    """An autoencoder of Stable Diffusion's class, which halves the sides with each block but the first."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    )


def qwen3(causal: bool, layers: int = 2) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(**LANGUAGE, num_hidden_layers=layers, head_dim=8)
    return (Qwen3ForCausalLM if causal else Qwen3Model)(config).eval()


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**LANGUAGE, num_hidden_layers=2, head_dim=8, sliding_window=64)).eval()


def flux2_parts(guided: bool) -> dict[str, Any]:
    """Transformer and autoencoder of FLUX.2, with a block of each kind, and statistics that are not the start's."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=32,
        guidance_embeds=guided,
    )
    autoencoder = AutoencoderKLFlux2(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=4,
        sample_size=16,
    )
    autoencoder.bn.running_mean.uniform_(-1, 1)
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return {
        "transformer": transformer,
        "vae": autoencoder.eval(),
        "scheduler": scheduler(use_dynamic_shifting=True),
    }


def flux2(seed: int = 0) -> Any:
    """A FLUX.2 dev pipeline, whose text encoder has 30 layers, because three of their states are read."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(seed)
    text = {**LANGUAGE, "model_type": "mistral", "num_hidden_layers": 30, "head_dim": 8}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 30,
        "patch_size": 6,
        "head_dim": 8,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=3)
    encoder = Mistral3ForConditionalGeneration(config).eval()
    return _quiet(Flux2Pipeline(text_encoder=encoder, tokenizer=tokenizer(), **flux2_parts(guided=True)))


def klein(seed: int = 0, is_distilled: bool = False) -> Any:
    """A FLUX.2 klein pipeline."""
    from diffusers import Flux2KleinPipeline

    torch.manual_seed(seed)
    encoder = qwen3(causal=True, layers=27)
    parts = flux2_parts(guided=False)
    return _quiet(
        Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer(), is_distilled=is_distilled, **parts)
    )


def qwen_image(seed: int = 0) -> Any:
    """A Qwen-Image pipeline."""
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.1, 2.0],
    ).eval()
    config = Qwen2_5_VLConfig(
        text_config={
            **LANGUAGE,
            "num_hidden_layers": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
    )
    return _quiet(
        QwenImagePipeline(
            transformer=transformer,
            vae=autoencoder,
            scheduler=scheduler(use_dynamic_shifting=True),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
            tokenizer=tokenizer(),
        )
    )


def z_image(seed: int = 0) -> Any:
    """A Z-Image pipeline."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 32, 32],
    )
    with torch.no_grad():  # which diffusers leaves uninitialized
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    return _quiet(
        ZImagePipeline(
            transformer=transformer,
            vae=vae(4),
            scheduler=scheduler(shift=3.0),
            text_encoder=qwen3(causal=False),
            tokenizer=tokenizer(),
        )
    )


def lumina2(seed: int = 0) -> Any:
    """A Lumina 2 pipeline, whose autoencoder makes sides 8 times smaller, as its code has it."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 64, 64),
        cap_feat_dim=16,
    )
    return _quiet(
        Lumina2Pipeline(
            transformer=transformer,
            vae=vae(4, 4),
            scheduler=scheduler(shift=6.0),
            text_encoder=gemma2(),
            tokenizer=tokenizer(),
        )
    )


def sana(seed: int = 0) -> Any:
    """A SANA pipeline, with the multistep solver that the published ones have."""
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=4,
    )
    autoencoder = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _quiet(
        SanaPipeline(
            transformer=transformer,
            vae=autoencoder.eval(),
            scheduler=solver,
            text_encoder=gemma2(),
            tokenizer=tokenizer(),
        )
    )


# By a short name; with the side of pictures that suits them.
FLOW_PIPELINES: dict[str, Any] = {
    "flux2": (flux2, 16),
    "klein": (klein, 16),
    "qwen_image": (qwen_image, 16),
    "z_image": (z_image, 16),
    "lumina2": (lumina2, 32),
    "sana": (sana, 32),
    "sd3": (sd3, 16),
}
