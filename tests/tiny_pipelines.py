"""Small random diffusers pipelines, built from configurations: no download, a second each."""

from __future__ import annotations

import warnings
from typing import Any

import torch

# What diffusers says of image processors without torchvision, and of safety checkers that are left out.
warnings.filterwarnings("ignore", message=".*(fast image processor|torchvision).*")


def clip_tokenizer() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=16)


def clip(tokenizer: Any, projected: bool, hidden: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def sdxl_unet(layers: int = 2) -> Any:
    """A UNet of SDXL's kind with two blocks, the second with attention; weights from the default generator."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        norm_num_groups=4,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )


def sdxl(seed: int = 0) -> Any:
    """An SDXL pipeline whose UNet has two blocks, the second with attention."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    unet = sdxl_unet()
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    return _quiet(
        StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=clip(tokenizer, False),
            text_encoder_2=clip(tokenizer, True),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=EulerDiscreteScheduler(),
        )
    )


def sd(seed: int = 0, prediction: str = "v_prediction") -> Any:
    """A Stable Diffusion 2 pipeline: v-prediction, one text encoder, a small U-Net."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    return _quiet(
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=clip(tokenizer, False),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(prediction_type=prediction, steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sd3(seed: int = 0) -> Any:
    """An SD3 pipeline with two blocks, without its T5."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=clip(tokenizer, True),
            tokenizer=tokenizer,
            text_encoder_2=clip(tokenizer, True),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def flux(seed: int = 0) -> Any:
    """A FLUX pipeline with one block of each kind."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((letter, -2.0) for letter in "▁abcdefghijklmnop"),
    ]
    t5 = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=1,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=clip(tokenizer, False),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(t5).eval(),
            tokenizer_2=T5Tokenizer(vocab=pieces),
            transformer=transformer,
        )
    )


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def outputs(pipeline: Any) -> dict[str, torch.Tensor]:
    """One call of each adapted model of an SDXL pipeline: a whole run would amplify roundings a thousandfold."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 200, (1, 8), generator=generator)
    x, words = (torch.randn(*s, generator=generator) for s in ((1, 4, 8, 8), (1, 8, 32)))
    added = {
        name: torch.randn(1, n, generator=generator) for name, n in (("text_embeds", 16), ("time_ids", 6))
    }
    found = {"unet": pipeline.unet(x, torch.tensor(500), words, added_cond_kwargs=added).sample}
    for name in ("text_encoder", "text_encoder_2"):
        states = getattr(pipeline, name)(ids, output_hidden_states=True).hidden_states
        found[name] = states[-2]
    return found


def latents(pipeline: Any, size: int = 16) -> torch.Tensor:
    """What a pipeline makes of a fixed prompt in two steps, before decoding."""
    generator = torch.Generator().manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = pipeline(
            "a cat",
            num_inference_steps=2,
            height=size,
            width=size,
            generator=generator,
            output_type="latent",
            **({"max_sequence_length": 8} if "Flux" in type(pipeline).__name__ else {}),
        )
    return done.images.detach()
