"""Make a vision-language model and an adapter of an old transformers, or run such an adapter there.

    python old_transformers.py make FOLDER      FOLDER/NAME/{base,adapter}, and expected.safetensors of what they give
    python old_transformers.py run  FOLDER      NAME/back, an adapter of the old names: writes found.safetensors

Run by an interpreter that has transformers 4.51 and a PEFT of its time: before 4.52 modules were called in memory as in
the checkpoints. Only text is read, so adapters are of language models and are compared there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
IDS = torch.arange(3, 27).view(2, 12)
TARGETS = r".*layers\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)"


def models() -> dict[str, Any]:
    t = transformers
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return {
        "qwen2_vl": lambda: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(
                **TEXT,
                rope_scaling=rope,
                vision_config=vision,
                image_token_id=60,
                video_token_id=61,
                vision_start_token_id=59,
                vision_end_token_id=58,
            )
        ),
        "llava": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                vision_config=t.CLIPVisionConfig(**TOWER, projection_dim=16),
                text_config=t.LlamaConfig(**TEXT),
                image_token_index=63,
            )
        ),
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False
        ).logits
    return found.contiguous()


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    for name, build in models().items():
        place = folder / name
        torch.manual_seed(0)
        if what == "make":
            model = build()
            model.save_pretrained(place / "base")
            lora = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)
            adapted = get_peft_model(model, lora)
            adapted.save_pretrained(place / "adapter")
            save_file({"logits": logits(adapted)}, place / "expected.safetensors")
        else:
            base = type(build()).from_pretrained(place / "base")
            save_file(
                {"logits": logits(PeftModel.from_pretrained(base, place / "back")), "plain": logits(build())},
                place / "found.safetensors",
            )


if __name__ == "__main__":
    main()
