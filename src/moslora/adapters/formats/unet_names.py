"""The names of modules of Stable Diffusion's U-Nets and of text encoders, as kohya's trainers write them.

Their paths have underscores for dots. A U-Net's modules have diffusers' names or those of the code that it was
published with (``input_blocks``), which sd-scripts trains SDXL with.
"""

from __future__ import annotations

import re

from moslora.adapters.formats.pipeline import BEGINNINGS

__all__ = ["dotted", "in_unet"]

# Names that contain underscores, or stand alone, between the dots of a path.
_WORDS = """
down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2
to_q to_k to_v to_out ff net proj proj_in proj_out
conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding class_embedding
linear linear_1 linear_2 cond_proj
input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op out time_embed label_emb
text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection
block layer SelfAttention q k v o DenseReluDense wi wi_0 wi_1 wo"""
WORDS = frozenset(_WORDS.split())


# Wan's, whose name begins as a U-Net's.
OTHERS = re.compile(r"time_embedding\.\d")


def dotted(flat: str) -> str:
    """Turn underscores back to the dots that they were, by the known names, the longest first.

    Args:
        flat: Path of a module of a U-Net, CLIP or T5, with underscores for dots.

    Returns:
        The path with dots.

    Raises:
        ValueError: If a part of it is the name of no module there; the message is that part.
    """
    words, parts, start = flat.split("_"), [], 0
    while start < len(words):
        for end in range(min(start + 3, len(words)), start, -1):
            name = "_".join(words[start:end])
            if name in WORDS or (end == start + 1 and name.isdigit()):
                parts.append(name)
                start = end
                break
        else:
            raise ValueError(words[start])
    return ".".join(parts)


def in_unet(path: str, is_flat: bool) -> str | None:
    """Return the path in diffusers' U-Net.

    Args:
        path: Of a module.
        is_flat: Whether it has underscores for dots.

    Returns:
        The path; None if it is not a module of a U-Net of Stable Diffusion.
    """
    try:
        path = _from_original(dotted(path) if is_flat else path)
    except ValueError:
        return None
    return path if re.match(BEGINNINGS["unet"], path) and not OTHERS.match(path) else None


RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}


def _from_original(path: str) -> str:
    """Rename a module of the original UNet to diffusers': two resnets in every block down, three up."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    found = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(.+)", path)
    if not found:
        return path
    side, rest = found.groups()
    if side == "middle_block":
        index, _, rest = rest.partition(".")
        return f"{MIDDLE[index]}.{RESNET.get(rest, rest)}" if index in MIDDLE else path
    index, inner, rest = (*rest.split(".", 2), "", "")[:3]
    if not (index.isdigit() and inner.isdigit() and rest):
        return path
    position = int(index) - (side == "input_blocks")
    block, layer = divmod(position, 3)
    if side == "input_blocks":
        if rest == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
        kind = "attentions" if inner == "1" else "resnets"
        return f"down_blocks.{block}.{kind}.{layer}.{RESNET.get(rest, rest)}"
    if rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv"
    kind = "attentions" if inner == "1" else "resnets"
    return f"up_blocks.{block}.{kind}.{layer}.{RESNET.get(rest, rest)}"
