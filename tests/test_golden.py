"""Golden files: the names, shapes, dtypes and metadata that other programs look for, format by format.

``tests/golden/FORMAT.json`` changes only on purpose: ``python tests/test_golden.py`` writes them anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moslora.adapters.factors import Adapter, Factors, Form
from moslora.adapters.formats.pipeline import join
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.adapters.formats.table import FORMATS, WRITTEN

GOLDEN = Path(__file__).parent / "golden"
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def factors(n_in: int, n_out: int, r: int = 2, form: Form = Form()) -> Factors:  # noqa: B008  frozen
    return Factors(torch.ones(r, n_in), torch.eye(r).flip(0), torch.ones(n_out, r), 0.5, form)


def language() -> Adapter:
    modules = {
        "lm_head": factors(8, 20),
        "model.embed_tokens": factors(20, 8, form=Form("embedding")),
        "model.layers.0.self_attn.k_proj": factors(8, 4),
        "model.layers.0.self_attn.q_proj": factors(8, 8),
        "model.layers.1.mlp.down_proj": factors(12, 8),
    }
    config = {"r": 2, "lora_alpha": 1, "target_modules": sorted({n.rpartition(".")[2] for n in modules})}
    return Adapter(modules, {**config, "base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"})


def image() -> Adapter:
    unet = {
        "conv_in": factors(36, 8, form=Form("conv", (3, 3))),
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0": factors(8, 8, 1),
        "mid_block.resnets.0.time_emb_proj": factors(16, 8),
    }
    clip = {f"encoder.layers.0.self_attn.{name}": factors(8, 8, 1) for name in ("q_proj", "out_proj")}
    big = {f"text_model.{name}": f for name, f in clip.items()}
    return join({"unet": Adapter(unet), "text_encoder": Adapter(clip), "text_encoder_2": Adapter(big)})


def transformer() -> Adapter:
    """Of FLUX.2, two parts of a fused projection among its modules."""
    modules = {
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": factors(8, 72),
        "transformer_blocks.1.attn.to_q": factors(8, 8),
        "transformer_blocks.1.attn.to_v": factors(8, 8, 1),
        "transformer_blocks.1.ff.linear_in": factors(8, 48),
    }
    return join({"transformer": Adapter(modules)})


def describe(place: Path) -> dict[str, Any]:
    """All that a reader goes by, but for the values."""
    if place.is_dir():
        parts = sorted(p for p in place.rglob("*") if p.is_file())
        return {str(p.relative_to(place)): describe(p) for p in parts}
    if place.suffix == ".json":
        config = json.loads(place.read_text(encoding="utf-8"))
        unset = (None, False, [], {}, "")
        # PEFT adds arguments from version to version; what is unset says nothing.
        return {k: v for k, v in config.items() if v not in unset and k != "peft_version"}
    if place.suffix == ".gguf":
        import gguf

        reader = gguf.GGUFReader(place)
        fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        tensors = {t.name: [t.tensor_type.name, *map(int, t.shape)] for t in reader.tensors}
        return {"metadata": fields, "tensors": tensors}
    with safe_open(place, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in sorted(file.keys())}
        tensors = {key: [str(part.get_dtype()), *part.get_shape()] for key, part in slices.items()}
        return {"metadata": dict(sorted(file.metadata().items())), "tensors": tensors}


def write(to: str, folder: Path) -> dict[str, Any]:
    format_ = FORMATS[to]
    assert format_.write is not None
    place = folder / f"adapter{format_.suffix}"
    if not format_.suffix:
        place.mkdir()
    options = {"base": BASE} if format_.needs_base else {}
    made = {"diffusers": image, "kohya": image, "original": transformer}.get(to, language)()
    format_.write(made, place, **options)
    return describe(place)


@pytest.mark.parametrize("to", WRITTEN)
def test_what_is_written_has_the_golden_names_shapes_dtypes_and_metadata(tmp_path: Path, to: str) -> None:
    assert write(to, tmp_path) == json.loads((GOLDEN / f"{to}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", ["official", "official-2294", "paddle", "kohya-original", "diffusers-authors"]
)
def test_what_others_write_is_read_by_its_golden_names(tmp_path: Path, name: str) -> None:
    golden = json.loads((GOLDEN / f"read-{name}.json").read_text(encoding="utf-8"))
    place = tmp_path / golden["place"]
    for file, content in golden["files"].items():
        path = place / file if file else place
        path.parent.mkdir(parents=True, exist_ok=True)
        if "tensors" not in content:
            path.write_text(json.dumps(content), encoding="utf-8")
            continue
        torch.manual_seed(0)
        tensors = {key: torch.randn(shape) for key, shape in content["tensors"].items()}
        if path.suffix == ".bin":
            torch.save(tensors, path)
        else:
            save_file(tensors, path, metadata=content.get("metadata"))
    assert detect(place) == golden["format"]
    found = read_adapter(place)
    assert {
        module: [list(f.A.shape), list(f.B.shape), f.scale, f.is_folded]
        for module, f in found.modules.items()
    } == golden["modules"]


if __name__ == "__main__":
    for name in WRITTEN if len(sys.argv) == 1 else sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(write(name, Path(folder)), indent=1, ensure_ascii=False)
            (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")
