"""Build the small world's image model: an SDXL pipeline of two million parameters that draws captioned shapes.

    caption → two small CLIP text encoders (own vocabulary) → U-Net on 24 × 24 pixels → autoencoder, here the identity

It is shaped as SDXL is (two text encoders, their second but last layers side by side, pooled text and picture sizes as
further conditions) and is an ordinary diffusers folder. U-Net and text encoders learn together to draw what captions
say. Captions are left out of one example in ten, so that guidance works. Nothing of it has seen the subject.

``--shape flux`` builds one of FLUX's kind instead, into a folder of its own: a CLIP text encoder for the pooled words,
a T5 encoder for all of them, and a transformer of double and single blocks that learns flow matching, without guidance,
on the same captions and behind the same autoencoder. Its prompts are 26 tokens long and its pictures 24 pixels wide;
it has to be told: task.max_sequence_length=26 and data.resolution=24, and in diffusers max_sequence_length, height and
width. It takes 25 CPU minutes and draws less well: shape and colour in 22 of 35 pictures, the background in 17 of 17.

    python recipes/shapes/build_pipeline.py [FOLDER] [--shape sdxl|flux] [--seed N] [--quick]

Needs no network; takes 38 minutes of CPU time on one core, less on a GPU. Measured: what it draws has the shape, colour
and background that a caption of one thing asks for (34 of 35 held-out ones), but places are not learned (4 of 29,
guessing is right for one in four), and of two things colours and shapes are mixed up (4 of 29 right). ``--quick`` takes
a few steps and draws noise. The folder appears when all is done, never in part, and is not overwritten; interrupted,
the same command continues where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from captions import EDGE, WORDS, captioned, pixels

SAY = partial(print, flush=True)
WIDTH = 64  # of a text encoder
LOUD = 128.0  # beside pixels from -1 to 1
RATE, UNTOLD = 1.5e-3, 0.1  # learning rate, and the share of examples whose captions are left out
TOKENS = 26  # the longest caption has 24, with beginning and end
# What was added to a picture's condition: its size, where it was cropped, and the size to draw. Always the same here.
SIZES = (EDGE, EDGE, 0, 0, EDGE, EDGE)


@dataclass(frozen=True)
class Amount:
    """How much is learned: steps, pictures in each, and pictures to draw them from."""

    steps: int = 7000
    batch: int = 16
    pictures: int = 16384


QUICK = Amount(steps=2, batch=4, pictures=16)


def tokenizer() -> Any:
    """Return a CLIP tokenizer in which every word of the world, and every rare one, is one token.

    Other text is spelt in bytes. Pairs are merged as byte pair encoding does, the most frequent first, until no word
    of the list is in parts.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    spelt = {word: [*word[:-1], word[-1] + "</w>"] for word in WORDS}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for parts in spelt.values() for pair in pairwise(parts))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in spelt.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            spelt[word] = joined
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: n for n, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def text_encoder(words: Any, projected: bool) -> Any:
    """Return a random CLIP text encoder of three layers, of which SDXL reads the second but last."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def autoencoder(**config: Any) -> Any:
    """Return an autoencoder whose latents are the pixels, to 2e-4: nothing has to be learned, nothing is lost.

    Its residual branches are zero. What is left in the way are a group norm and a SiLU before either last layer.
    Beside every x stands -x and beside them ±LOUD, so that the group's mean is 0 and its deviation that of ±LOUD
    whatever the picture is, and SiLU is the identity as far up as 30. It needs float32.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=EDGE,
        scaling_factor=1.0,
        **config,
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "resnets" not in name or "conv2" in name:
                parameter.zero_()
        for side in (vae.encoder, vae.decoder):
            for i in range(3):
                side.conv_in.weight[i, i, 1, 1], side.conv_in.weight[3 + i, i, 1, 1] = 1, -1
                side.conv_out.weight[i, i, 1, 1] = 1
            side.conv_in.bias[6], side.conv_in.bias[7] = LOUD, -LOUD
            side.conv_norm_out.weight[:3] = LOUD / 2  # the deviation of six small ones and two loud ones
            side.conv_norm_out.bias[:3] = 30
            side.conv_out.bias[:3] = -30
        vae.encoder.conv_out.bias[3:] = -30  # the logarithm of the variance
        for layer in (vae.quant_conv, vae.post_quant_conv):
            layer.weight.copy_(torch.eye(layer.weight.shape[0])[..., None, None])
    return vae.eval()


def unet() -> Any:
    """Return a random U-Net of SDXL's kind with attention at all scales but the finest, as SDXL's has it."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=EDGE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4),  # heads, whatever it is called
        transformer_layers_per_block=(1, 1, 1),
        use_linear_projection=True,
        norm_num_groups=8,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 8 * len(SIZES),
    )


def t5_tokenizer() -> Any:
    """Return a T5 tokenizer in which every word of the world, and every rare one, is one token.

    Other text is spelt in letters, and what is no letter is unknown.
    """
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0)]
    words = [("▁" + word, -1.0) for word in WORDS if len(word) > 1]  # "a" is a letter anyway
    letters = [(start + chr(ord("a") + n), -20.0) for start in ("", "▁") for n in range(26)]
    # One extra id would be named like a token that none of the texts has.
    return T5Tokenizer(vocab=[*special, *words, *letters, ("▁", -20.0)], extra_ids=0, model_max_length=TOKENS)


def t5_encoder(words: Any) -> Any:
    """Return a random T5 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(words),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    return T5EncoderModel(config)


def transformer() -> Any:
    """Return a random transformer of FLUX's kind: 144 patches of 2 × 2 pixels beside the words."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=12,  # 3 colours of a patch's 4 pixels
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def noise_schedule(scheduler: type[Any]) -> Any:
    """Return a scheduler of a class: v-prediction on a schedule that ends in noise alone."""
    return scheduler(
        beta_schedule="squaredcos_cap_v2",  # on small pictures a linear one is noise alone for half of its way
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


@dataclass(frozen=True)
class Keep:
    """A file that training continues from: parameters and Adam's two means of each, in order.

    Attributes:
        file: Its place.
        settings: What has to be the same for it to be of use.
    """

    file: Path
    settings: dict[str, str]

    def save(self, parameters: list[nn.Parameter], optimizer: Any, step: int) -> None:
        """Write the state after a step, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {}
        for n, parameter in enumerate(parameters):
            state = optimizer.state.get(parameter, {})  # none for what has no gradient
            for name, tensor in (("value", parameter.detach()), *state.items()):
                tensors[f"{n}.{name}"] = tensor.contiguous()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        save_file(tensors, part, metadata={**self.settings, "step": str(step)})
        part.replace(self.file)

    def restore(self, parameters: list[nn.Parameter], optimizer: Any) -> int:
        """Read the state into parameters and optimizer, and return its step; 0 where there is none of use."""
        from safetensors import safe_open

        if not self.file.is_file():
            return 0
        with safe_open(self.file, "pt") as found:
            notes = dict(found.metadata())
            step = int(notes.pop("step"))
            if notes != self.settings:
                return 0
            for name in found.keys():  # noqa: SIM118 - it is no dictionary
                n, part = name.split(".")
                parameter, tensor = parameters[int(n)], found.get_tensor(name)
                if part == "value":
                    parameter.data.copy_(tensor)
                else:
                    optimizer.state[parameter][part] = (
                        tensor if part == "step" else tensor.to(parameter.device)
                    )
        return step


def rate_at(step: int, steps: int, highest: float) -> float:
    """Return the learning rate of a step, from 1: up for a twentieth of the way, then down along a cosine."""
    rise = max(1, steps // 20)
    if step <= rise:
        return highest * step / rise
    return highest * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


def optimise(
    modules: list[nn.Module], loss: Callable[[int], Tensor], steps: int, highest: float, keep: Keep, say: Any
) -> None:
    """Take steps of Adam down a loss; continues from what ``keep`` holds, which is renewed fifty times on the way.

    Args:
        modules: Whose parameters are trained.
        loss: From a step's number, on which alone it may depend, to its loss.
        steps: How many.
        highest: Learning rate.
        keep: What an earlier call left.
        say: Takes lines of progress.
    """
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=highest)
    done = keep.restore(parameters, optimizer)
    if done:
        say(f"continuing after step {done}")
    recent: list[float] = []
    for module in modules:
        module.train()
    for step in range(done + 1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, highest)
        optimizer.zero_grad()
        found = loss(step)
        found.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append(found.item())
        if step % max(1, steps // 50) == 0:
            keep.save(parameters, optimizer, step)
        if step % max(1, steps // 10) == 0:
            say(f"step {step} of {steps}: loss {sum(recent) / len(recent):.4f}")
            recent.clear()
    for module in modules:
        module.eval()


def lessons(
    seed: int, count: int, tokenizers: Sequence[Any], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Return pictures and their captions.

    Returns:
        Pictures as the denoiser sees them, ``(count, 3, EDGE, EDGE)``, for the autoencoder would leave them as they
        are; and each tokenizer's words, ``(count, TOKENS)``.
    """
    made = captioned(seed, count)
    texts = [told.caption for _, told in made]
    options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    words = [tokenizer_(texts, **options).input_ids.to(device) for tokenizer_ in tokenizers]
    return pixels([picture for picture, _ in made]).to(device), words


def teach_to_draw(pipeline: Any, amount: Amount, seed: int, keep: Keep, say: Any) -> None:
    """Train U-Net and text encoders together on captioned pictures."""
    from diffusers import DDPMScheduler

    device = pipeline.unet.device
    shown, (ids,) = lessons(seed, amount.pictures, [pipeline.tokenizer], device)
    noising = noise_schedule(DDPMScheduler)
    sizes = torch.tensor([SIZES], dtype=torch.float32, device=device).expand(amount.batch, -1)

    def loss(step: int) -> Tensor:
        # Drawn on the CPU, from the step's own seed: the same on every device, and after an interruption.
        chance = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(ids), (amount.batch,), generator=chance)
        noise = torch.randn(amount.batch, *shown.shape[1:], generator=chance).to(device)
        at = torch.randint(1000, (amount.batch,), generator=chance).to(device)
        told = (torch.rand(amount.batch, generator=chance) >= UNTOLD).float().to(device)
        latents = shown[rows]
        first = pipeline.text_encoder(ids[rows], output_hidden_states=True).hidden_states[-2]
        second = pipeline.text_encoder_2(ids[rows], output_hidden_states=True)
        # An empty prompt is all zeros to SDXL.
        words = torch.cat([first, second.hidden_states[-2]], dim=-1) * told[:, None, None]
        conditions = {"text_embeds": second.text_embeds * told[:, None], "time_ids": sizes}
        noisy = noising.add_noise(latents, noise, at)
        found = pipeline.unet(noisy, at, words, added_cond_kwargs=conditions).sample
        return F.mse_loss(found, noising.get_velocity(latents, noise, at))

    trained = [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]
    optimise(trained, loss, amount.steps, RATE, keep, say)


def teach_to_flow(pipeline: Any, amount: Amount, seed: int, keep: Keep, say: Any) -> None:
    """Train transformer and text encoders together on captioned pictures, by flow matching."""
    device = pipeline.transformer.device
    shown, (short, long) = lessons(seed, amount.pictures, [pipeline.tokenizer, pipeline.tokenizer_2], device)
    half = EDGE // 2
    places = pipeline._prepare_latent_image_ids(amount.batch, half, half, device, torch.float32)
    order = torch.zeros(TOKENS, 3, device=device)  # FLUX tells words no places

    def packed(pictures: Tensor) -> Tensor:
        found: Tensor = pipeline._pack_latents(pictures, amount.batch, 3, EDGE, EDGE)
        return found  # (batch, half · half, 12)

    def loss(step: int) -> Tensor:
        # As above: drawn on the CPU, from the step's own seed.
        chance = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(short), (amount.batch,), generator=chance)
        noise = torch.randn(amount.batch, *shown.shape[1:], generator=chance).to(device)
        share = torch.sigmoid(torch.randn(amount.batch, generator=chance)).to(device)  # logit-normal
        clean, wide = shown[rows], share[:, None, None, None]
        found = pipeline.transformer(
            hidden_states=packed((1 - wide) * clean + wide * noise),
            timestep=share,  # FLUX's runs from 0 to 1
            encoder_hidden_states=pipeline.text_encoder_2(long[rows]).last_hidden_state,
            pooled_projections=pipeline.text_encoder(short[rows]).pooler_output,
            img_ids=places,
            txt_ids=order,
        ).sample
        return F.mse_loss(found, packed(noise - clean))

    trained = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    optimise(trained, loss, amount.steps, RATE, keep, say)


def sdxl() -> Any:
    """Return a random pipeline of SDXL's kind."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    words = tokenizer()
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(words, projected=False),
        text_encoder_2=text_encoder(words, projected=True),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet(),
        scheduler=noise_schedule(EulerDiscreteScheduler),
        add_watermarker=False,
    )


def flux() -> Any:
    """Return a random pipeline of FLUX's kind."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    words, long_words = tokenizer(), t5_tokenizer()
    return FluxPipeline(
        vae=autoencoder(shift_factor=0.0),
        text_encoder=text_encoder(words, projected=False),
        text_encoder_2=t5_encoder(long_words),
        tokenizer=words,
        tokenizer_2=long_words,
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


@dataclass(frozen=True)
class Shape:
    """A kind of pipeline: how a random one is made and taught, where it goes, and the name of its denoiser."""

    make: Callable[[], Any]
    teach: Callable[[Any, Amount, int, Keep, Any], None]
    folder: str
    denoiser: str


SHAPED = {
    "sdxl": Shape(sdxl, teach_to_draw, "pipeline", "unet"),
    "flux": Shape(flux, teach_to_flow, "pipeline-flux", "transformer"),
}


def build(
    folder: Path, amount: Amount | None = None, seed: int = 0, say: Any = SAY, shape: str = "sdxl"
) -> None:
    """Train a pipeline and write it; what an interrupted call had learned is used.

    Args:
        folder: Where to; must not exist.
        amount: How much is learned.
        seed: Of weights, pictures and order.
        say: Takes lines of progress.
        shape: A key of ``SHAPED``.

    Raises:
        FileExistsError: If ``folder`` exists.
    """
    amount = amount or Amount()
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it to build it anew, or name another folder.")
    # Of image processors, which fall back to PIL without torchvision.
    warnings.filterwarnings("ignore", message=".*(fast image processor|torchvision).*")
    torch.manual_seed(seed)
    shaped = SHAPED[shape]
    pipeline = shaped.make().to("cuda" if torch.cuda.is_available() else "cpu")
    about = (
        {} if shape == "sdxl" else {"shape": shape}
    )  # files of SDXL's kind are as they were without a choice
    settings = {"seed": str(seed), **{key: str(value) for key, value in vars(amount).items()}, **about}
    keep = Keep(folder.with_name(folder.name + ".partial") / "training.safetensors", settings)
    shaped.teach(pipeline, amount, seed, keep, say)

    beside = keep.file.parent / "whole"
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.to("cpu").save_pretrained(beside)
    notes = {"seed": seed, **vars(amount), **about, "torch": torch.__version__}
    (beside / "built.json").write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
    beside.rename(folder)
    shutil.rmtree(keep.file.parent)
    parts = (shaped.denoiser, "vae", "text_encoder", "text_encoder_2")
    count = sum(p.numel() for part in parts for p in getattr(pipeline, part).parameters())
    say(f"Wrote {count:,} parameters into {folder}")


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folder", nargs="?", type=Path, help="pipeline or pipeline-flux beside this file")
    asked.add_argument("--shape", choices=sorted(SHAPED), default="sdxl")
    asked.add_argument("--steps", type=int, default=Amount.steps, help="optimiser steps; fewer to try it out")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--quick", action="store_true", help="a few steps of each, for trying it out")
    given = asked.parse_args()
    try:
        place = given.folder or Path(__file__).with_name(SHAPED[given.shape].folder)
        build(place, QUICK if given.quick else Amount(steps=given.steps), given.seed, shape=given.shape)
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command continues from what was learned.")
    except FileExistsError as error:
        sys.exit(str(error))
