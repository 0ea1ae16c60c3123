"""The names of tensors in LoRA files of image tools: which program writes which, and what each part of a name means.

A name is, from left to right, wrappers that a program left around its model (``module.``, ``base_model.model.``), the
layout's prefix, which says the model of the pipeline, the module's path, and the part: A, B, alpha. ``LAYOUTS`` has the
prefixes, ``PARTS`` the parts, ``OTHER_METHODS`` the parts of methods whose update is not s·B·A.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moslora.adapters.formats.pipeline import COMPONENTS

__all__ = ["DENOISER", "LAYOUTS", "T5", "Key", "Layout", "other_method", "split_key", "unwrap"]

# Models that a prefix leaves open: the U-Net or transformer, and a T5, which is the second or the third text encoder.
DENOISER, T5 = "denoiser", "t5"


@dataclass(frozen=True)
class Layout:
    """A way to name modules.

    Attributes:
        prefix: What a tensor's name begins with.
        component: The model of the pipeline: one of ``COMPONENTS``, ``DENOISER`` or ``T5``.
        is_flat: Whether paths have underscores for dots.
        writer: Which programs save it.
    """

    prefix: str
    component: str
    is_flat: bool
    writer: str


_KOHYA = "kohya's sd-scripts and musubi-tuner"
_COMFYUI = "ComfyUI and ai-toolkit"
LAYOUTS = (
    Layout("lora_unet_", DENOISER, True, _KOHYA),
    Layout("lora_te_", "text_encoder", True, _KOHYA),
    Layout("lora_te1_", "text_encoder", True, _KOHYA),
    Layout("lora_te2_", "text_encoder_2", True, _KOHYA),
    Layout("lora_te3_", T5, True, "sd-scripts and OneTrainer, for the T5 of FLUX.1 and SD3"),
    Layout("lora_transformer_", "transformer", True, "OneTrainer"),
    Layout("lycoris_", DENOISER, True, "SimpleTuner and ai-toolkit, through LyCORIS"),
    Layout("model.diffusion_model.", DENOISER, False, _COMFYUI),
    Layout("diffusion_model.", DENOISER, False, _COMFYUI),
    Layout("text_encoders.clip_l.transformer.", "text_encoder", False, _COMFYUI),
    Layout("text_encoders.clip_g.transformer.", "text_encoder_2", False, _COMFYUI),
    Layout("text_encoders.t5xxl.transformer.", T5, False, _COMFYUI),
    Layout("dit.", DENOISER, False, "DiffSynth-Studio"),
    *(Layout(f"{name}.", name, False, "diffusers") for name in COMPONENTS),
)
# Names without a prefix, as the model itself has them.
BARE = Layout("", DENOISER, False, "programs that save the model's own names, as xlabs' trainer and PEFT")

# What is around a model that is compiled, on several GPUs, in a pipeline, or PEFT's.
WRAPPERS = (
    *("state_dict.", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "pipe.", "pipeline."),
    "base_model.model.",
)

_AROUND = re.compile(rf"\A(?:{'|'.join(map(re.escape, WRAPPERS))})+")
_INSIDE = re.compile(r"\.(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"  # the adapter's name, as PEFT has it in memory
PARTS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), letter)
    for pattern, letter in (
        (
            rf"(?P<path>.+)\.(?:lora_A{_ADAPTER}|lora_down{_ADAPTER}|lora(?:_linear_layer)?\.down)\.weight",
            "A",
        ),
        (rf"(?P<path>.+)\.(?:lora_B{_ADAPTER}|lora_up{_ADAPTER}|lora(?:_linear_layer)?\.up)\.weight", "B"),
        (r"(?P<path>.+)\.(?:lora_AB|lora_mixer|lora_downB|lora(?:_linear_layer)?\.downB)\.weight", "M"),
        (r"(?P<path>.+)\.lora_mid\.weight", "core"),
        (r"(?P<path>.+)\.(?:lora_)?alpha", "alpha"),
        (r"(?P<path>.+\.processor\.\w*lora\d?)\.down\.weight", "A"),
        (r"(?P<path>.+\.processor\.\w*lora\d?)\.up\.weight", "B"),
    )
)
_OLD_ATTENTION = re.compile(r"(?P<path>.+)\.processor\.(?P<what>to_q|to_k|to_v|to_out)_lora")

# What else LyCORIS and its like save, by a part of the last words of the name.
_METHODS = (
    (r"hada_[wt]\w+", "LoHa"),
    (r"lokr_[wt]\w+", "LoKr"),
    (r"oft_(blocks|diag|R)\b.*|boft_\w+|vera_lambda_\w+|on_input|lora_ia3|ia3_\w+", "OFT, BOFT, VeRA or IA3"),
    (r"dora_scale|lora_magnitude_vector.*|w_norm_scale", "DoRA"),
    (r"a1\.weight|a2\.weight|b1\.weight|b2\.weight", "GLoRA"),
    (r"bm\.weight|lora_S.*|lora_E|ranknum", "AdaLoRA or GLoKr"),
    (r"diff|diff_b|w_norm|b_norm|set_weight|reshape_weight", "full weights"),
    (r"lora_(?:A|B|up|down)\.bias", "a bias beside A or B"),
)
OTHER_METHODS = tuple((re.compile(rf"(?P<path>.+)\.(?:{pattern})"), method) for pattern, method in _METHODS)


@dataclass(frozen=True)
class Key:
    """The name of a factor, understood.

    Attributes:
        layout: How it is named.
        path: The module's path; with underscores for dots where the layout has that.
        letter: ``A``, ``B``, ``M``, ``core`` or ``alpha``.
    """

    layout: Layout
    path: str
    letter: str


def unwrap(name: str) -> str:
    """Take away what a program left around its model, before the layout's prefix and after it.

    Args:
        name: Of a tensor.

    Returns:
        The name as the layout has it.
    """
    inner = _without_wrappers(name)
    if inner.startswith("model.") and any(
        inner.startswith(f"model.{layout.prefix}") for layout in LAYOUTS if not layout.is_flat
    ):
        inner = inner.removeprefix("model.")
    layout = layout_of(inner)
    return f"{layout.prefix}{_without_wrappers(inner.removeprefix(layout.prefix))}"


def _without_wrappers(name: str) -> str:
    return _INSIDE.sub(".", _AROUND.sub("", name))


def layout_of(name: str) -> Layout:
    """Return the layout of a name without wrappers."""
    return next((layout for layout in LAYOUTS if name.startswith(layout.prefix)), BARE)


def split_key(name: str) -> Key | None:
    """Take the name of a tensor apart.

    Args:
        name: As the file has it.

    Returns:
        What it means; None if it is not a factor of LoRA.
    """
    inner = unwrap(name)
    layout = layout_of(inner)
    rest = inner.removeprefix(layout.prefix)
    for pattern, letter in PARTS:
        found = pattern.fullmatch(rest)
        if found:
            path = found["path"]
            old = _OLD_ATTENTION.fullmatch(path)
            if old:
                path = f"{old['path']}.{ {'to_out': 'to_out.0'}.get(old['what'], old['what']) }"
            return Key(layout, path, letter)
    return None


def other_method(name: str) -> str:
    """Tell which other method the name of a tensor is of; empty if of none that is known."""
    return next((method for pattern, method in OTHER_METHODS if pattern.fullmatch(name)), "")


def writers(names: Iterable[str]) -> str:
    """Say who saves names as these."""
    found = dict.fromkeys(layout_of(unwrap(name)).writer for name in names)
    return ", ".join(found)
