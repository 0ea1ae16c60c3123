"""Small random vision-language models of every family that task=vision reads, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

import tiny

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def template(picture: str) -> str:
    """A ChatML template that writes ``picture`` where a picture stands."""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}"
        + picture
        + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


TEMPLATE = template("<image>")


def tokenizer(*names: str, **roles: str) -> Any:
    """The tiny tokenizer with tokens for pictures; ``roles`` are those that a processor asks it for by name."""
    base = tiny.tokenizer()
    found = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=roles or None,
    )
    found.add_tokens(["<|im_start|>", *names], special_tokens=True)
    return found


def save_parts(folder: Path, parts: list[Any], chat: str | None, **settings: Any) -> None:
    """Write a processor's parts one by one, as they lie on a hub; none is made for videos."""
    for part in parts:
        part.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"do_resize": True}))
    (folder / "processor_config.json").write_text(json.dumps(settings))
    if chat is not None:
        (folder / "chat_template.jinja").write_text(chat)


def llama(vocabulary: int, **changes: Any) -> LlamaConfig:
    settings = {"max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 2, **SIZES, **changes}
    return LlamaConfig(vocab_size=vocabulary, **settings)


def seed() -> None:
    torch.manual_seed(0)  # whatever ran before


def save_llava(folder: Path, width: int = 16) -> None:
    words = tokenizer("<image>")
    wide = {"hidden_size": width, "intermediate_size": 2 * width}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **SIZES),
        text_config=llama(260, **wide),
        image_token_index=259,
    )
    seed()
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    sides = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=sides),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def save_llava_next(folder: Path) -> None:
    """LLaVA-NeXT: pictures in tiles, their number by the picture's shape."""
    grids = [[16, 32], [32, 16], [32, 32]]
    words = tokenizer("<image>")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **SIZES),
        text_config=llama(260),
        image_token_index=259,
        image_grid_pinpoints=grids,
    )
    seed()
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    sides = {"height": 16, "width": 16}
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size=sides, image_grid_pinpoints=grids
        ),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


SQUARES = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
AROUND = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *SQUARES]


def save_idefics3(folder: Path) -> None:
    """Idefics3: pictures split into squares, each between tokens that say its row and column."""
    words = tokenizer(*AROUND)
    config = Idefics3Config(
        vision_config={**SIZES, "image_size": 16, "patch_size": 4},
        text_config=llama(len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    seed()
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        tokenizer=words,
        image_seq_len=4,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def save_smolvlm(folder: Path) -> None:
    """SmolVLM: as Idefics3, with a part for videos."""
    words = tokenizer(*AROUND)
    config = SmolVLMConfig(
        vision_config={**SIZES, "image_size": 16, "patch_size": 4},
        text_config=llama(len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    seed()
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    images = SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    save_parts(folder, [images, words], TEMPLATE, processor_class="SmolVLMProcessor", image_seq_len=4)


VISION_MARKS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>")
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _save_qwen(folder: Path, config: Any, model: Any, name: str, vision: dict[str, Any], patch: int) -> None:
    words = tokenizer(*VISION_MARKS)
    image, video, start, end = words.convert_tokens_to_ids(VISION_MARKS)
    text = {**SIZES, "num_key_value_heads": 1, "vocab_size": len(words), "max_position_embeddings": 512}
    text |= {"rope_parameters": ROPE, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    if name == "Qwen3VLProcessor":
        text |= {"head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    seed()
    model(
        config(
            text_config=text,
            vision_config=vision,
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    ).save_pretrained(folder)
    sides = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (8 * patch) ** 2}
    images = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2, size=sides)
    save_parts(folder, [images, words], QWEN_TEMPLATE, processor_class=name)


def save_qwen2_vl(folder: Path) -> None:
    """Qwen2-VL: pictures of any shape, their tokens' positions in three directions."""
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    _save_qwen(folder, Qwen2VLConfig, Qwen2VLForConditionalGeneration, "Qwen2VLProcessor", vision, 4)


def save_qwen2_5_vl(folder: Path) -> None:
    """Qwen2.5-VL: some of its vision layers look into windows only."""
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]}
    _save_qwen(folder, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, "Qwen2_5_VLProcessor", vision, 4)


def save_qwen3_vl(folder: Path) -> None:
    """Qwen3-VL: early vision layers have a merger of their own into the language model."""
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    _save_qwen(folder, Qwen3VLConfig, Qwen3VLForConditionalGeneration, "Qwen3VLProcessor", vision, 4)


def save_internvl(folder: Path) -> None:
    """InternVL: its processor cuts pictures to tiles, which its image processor alone does not."""
    roles = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(*roles.values(), **roles)
    text = {**SIZES, "model_type": "qwen2", "num_key_value_heads": 1, "vocab_size": len(words)}
    text |= {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    config = InternVLConfig(
        text_config=text,
        vision_config={**SIZES, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    seed()
    InternVLForConditionalGeneration(config).save_pretrained(folder)
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, min_patches=1, max_patches=3)
    chat = template("<IMG_CONTEXT>")
    save_parts(folder, [images, words], chat, processor_class="InternVLProcessor", image_seq_length=4)


GEMMA = {"model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1, "eos_token_id": 2, "pad_token_id": 0}


def save_gemma3(folder: Path) -> None:
    """Gemma 3: a picture's tokens see each other in both directions."""
    roles = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    words = tokenizer(*roles.values(), **roles)
    begin, end, soft = words.convert_tokens_to_ids(list(roles.values()))
    text = {**SIZES, **GEMMA, "model_type": "gemma3_text", "vocab_size": len(words), "bos_token_id": 1}
    text |= {"sliding_window": 32, "query_pre_attn_scalar": 8, "max_position_embeddings": 512}
    config = Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**SIZES, "image_size": 16, "patch_size": 4, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=begin,
        eoi_token_index=end,
        image_token_index=soft,
    )
    seed()
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    chat = template("<start_of_image>")
    save_parts(folder, [images, words], chat, processor_class="Gemma3Processor", image_seq_length=4)


def save_paligemma(folder: Path) -> None:
    """PaliGemma: no chat; the question is seen in both directions, the answer one token after the other."""
    words = tokenizer("<image>", "<bos>", image_token="<image>")
    words.bos_token = "<bos>"
    words.chat_template = None
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    # What the processor adds to a tokenizer: places and shapes to point at.
    words.add_tokens([f"<loc{i:0>4}>" for i in range(1024)] + [f"<seg{i:0>3}>" for i in range(128)])
    text = {**SIZES, **GEMMA, "vocab_size": len(words), "bos_token_id": words.bos_token_id}
    config = PaliGemmaConfig(
        text_config=text,
        vision_config={
            **SIZES,
            "image_size": 16,
            "patch_size": 8,
            "vision_use_head": False,
            "projection_dim": 16,
        },
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=16,
        hidden_size=16,
    )
    seed()
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    save_parts(folder, [images, words], None, processor_class="PaliGemmaProcessor")


FAMILIES = {
    "llava": save_llava,
    "llava_next": save_llava_next,
    "idefics3": save_idefics3,
    "smolvlm": save_smolvlm,
    "internvl": save_internvl,
    "qwen2_vl": save_qwen2_vl,
    "qwen2_5_vl": save_qwen2_5_vl,
    "qwen3_vl": save_qwen3_vl,
    "gemma3": save_gemma3,
    "paligemma": save_paligemma,
}
