"""Say what a file is that is not an adapter: by its first bytes, and by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["describe_bytes", "describe_tensors"]

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
PICKLE = (
    "a pickle. Pickles (.pt, .ckpt) are not opened, because opening one can run code. Load it in the program that "
    "wrote it, and save it as .safetensors."
)

# What files begin with, and what to do about it.
MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "GGUF, which is written here but not read. Give what it was made from."),
    (
        b"PK\x03\x04",
        "a zip file, as torch.save (.pt, .ckpt, .bin) and numpy (.npz) write. Pickles (.pt, .ckpt) are not opened, "
        "because opening one can run code. Load it in the program that wrote it, and save it as .safetensors.",
    ),
    (b"\x80", PICKLE),
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, in whose place the file has not been downloaded. git lfs pull.",
    ),
    (b"<", "a web page, as a download without a login leaves. Download the file again."),
    (b"\x93NUMPY", "an array of numpy (.npy), not an adapter. Give the adapter's .safetensors."),
    (b"\x1f\x8b", "a gzip archive. Unpack it, and give what is in it."),
)

# What a safetensors file is if a name in it matches; the first that fits.
KINDS: tuple[tuple[str, str], ...] = (
    (
        r"exp_avg|exp_avg_sq|optimizer\W.*|state\.\d+\..*",
        "an optimizer's state, which a trainer saves beside the adapter. Give the adapter's file",
    ),
    (
        r"emb_params|string_to_param.*|clip_[lg]|t5xxl|<[^>]+>|bundle_emb.*",
        "an embedding (textual inversion), which has vectors of words and no LoRA. Load it with the pipeline's "
        "load_textual_inversion",
    ),
    (
        r".*\.lora_[ab]",
        "an adapter of MLX (mlx-lm), whose factors are transposed. Fuse it there with mlx_lm.fuse, or convert it to "
        "PEFT's layout",
    ),
    (
        r"(control_model|controlnet|input_hint_block|lora_controlnet|controlnet_\w+|lllite_\w+)\b.*",
        "a ControlNet. Load it with its own loader",
    ),
    (r"(ip_adapter|image_proj)\..*", "an IP-Adapter. Load it with the pipeline's load_ip_adapter"),
    (
        r"(lora_prior_|lora_prior_unet_|lora_prior_te_).*",
        "a LoRA of Stable Cascade, whose models are not known here. Merge it into its base in the program that trained "
        "it",
    ),
    (
        r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\..*",
        "a whole checkpoint of an image model (.safetensors with U-Net or transformer, VAE and text encoders), not an "
        "adapter of it. Give the LoRA's file",
    ),
    (
        r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block|down|up|mid|conv_in|conv_out)\b.*|(post_)?quant_conv\..*",
        "a VAE, not an adapter. Give the LoRA's file",
    ),
)
_LORA = re.compile(r".*\.(lora_[AB]|lora_(up|down|embedding_[AB])|moslora_\w+|lora\.(up|down))\b.*")


def describe_bytes(path: Path) -> str:
    """Say what a file is by its first bytes.

    Args:
        path: The file.

    Returns:
        What it is and what to do, to follow on "is"; empty if it is of no kind that is known.
    """
    try:
        with path.open("rb") as file:
            first = file.read(32)
    except OSError:  # the reader says why
        return ""
    if not first:
        return "an empty file. It was not written or not downloaded whole; copy it again."
    if first[8:9] == b"{":  # safetensors, whose first eight bytes are a length
        return ""
    kind = next((text for magic, text in MAGIC if first.startswith(magic)), "")
    return kind or (f"by its name {PICKLE}" if path.suffix in PICKLES else "")


def describe_tensors(names: Iterable[str], config: str) -> str:
    """Say what a safetensors file is by the names of its tensors.

    Args:
        names: Of its tensors, in which no factor of a known layout is.
        config: What PEFT calls the configuration of an adapter.

    Returns:
        What it is and what to do, to follow on the path.
    """
    names = list(names)
    if not names:
        return "is a safetensors file without tensors. Nothing was saved in it; take an earlier checkpoint."
    example = f", as {names[0]!r}"
    for pattern, text in KINDS:
        name = next((name for name in names if re.fullmatch(pattern, name)), None)
        if name is not None:
            return f"is {text} (it has {name!r})."
    factor = next((name for name in names if _LORA.fullmatch(name)), None)
    if factor is not None and any(".base_layer." in name for name in names):
        return (
            f"is a trainer's checkpoint of a whole model with its LoRA (it has {factor!r} beside the model's own "
            "weights). Save the adapter alone, with the model's save_pretrained, and give that directory."
        )
    if factor is not None:
        return (
            f"is a LoRA file of no known image model{f', as {factor!r}'}. If it belongs to a PEFT adapter, give the "
            f"directory with its {config}."
        )
    return (
        f"has no names of diffusers' or kohya's LoRA files{example}: it looks like the weights of a model. If it "
        f"belongs to a PEFT adapter, give the directory with its {config}."
    )
