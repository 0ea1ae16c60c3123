"""No two verbs judge one fact differently, and each piece of advice works."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from moslora.adapters.combine import combine
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import PROOF_FILE, export_adapter
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.facts import FACTS, facts_of, to_say
from moslora.adapters.findings import LEVELS
from moslora.adapters.formats import native
from moslora.adapters.merge import merge
from moslora.errors import AdapterError, ModelError, MoSLoRAError, ProofError
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of what is tried here

Q, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": [Q, V], "mixer": "custom"}


def factors(out: int, scale: float = 2.0, **changes: Any) -> Factors:
    generator = torch.Generator().manual_seed(out)
    A, M, B = (torch.randn(shape, generator=generator) for shape in ((4, 32), (4, 4), (out, 4)))
    return replace(Factors(A, M, B, scale), **changes)


def adapter(q: Mapping[str, Any] | None = None, v: Mapping[str, Any] | None = None, **more: Any) -> Adapter:
    extra = more.pop("extra", {})
    return Adapter({Q: factors(32, **(q or {})), V: factors(16, **(v or {}))}, {**CONFIG, **more}, extra)


ZERO = {"B": torch.zeros(32, 4)}, {"B": torch.zeros(16, 4)}
# Without a row and with ones, so that a singular value is zero.
FLAT = {"M": torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))}
LENGTHS = {"magnitude": torch.ones(32)}, {"magnitude": torch.ones(16)}
SHIFTS = {"bias": torch.ones(32)}, {"bias": torch.zeros(16)}
# Fact → an adapter of which it is so, and the verbs that refuse such an adapter, by whatever fact.
MADE: dict[str, tuple[Callable[[], Adapter], set[str]]] = {
    "untrained": (lambda: adapter(*ZERO), {"merge"}),
    "partly untrained": (lambda: adapter(ZERO[0]), set()),
    "trained": (adapter, set()),
    "alpha of zero": (lambda: adapter({"scale": 0.0}), set()),
    "alpha below zero": (lambda: adapter({"scale": -2.0}), set()),
    "large alpha": (lambda: adapter({"scale": 100.0}), set()),
    "usual alpha": (adapter, set()),
    "singular mixers": (lambda: adapter(FLAT), set()),
    "singular mixers with magnitudes": (lambda: adapter({**FLAT, **LENGTHS[0]}, LENGTHS[1]), {"merge", "combine"}),
    "whole mixers": (adapter, set()),
    "magnitudes": (lambda: adapter(*LENGTHS), {"merge", "combine"}),
    "biases": (lambda: adapter(*SHIFTS), {"merge"}),
    "tensors beside": (
        lambda: adapter(extra={"base_model.model.model.norm.weight": torch.full((32,), 2.0)}, modules_to_save=["norm"]),
        {"combine"},
    ),
    "unlike LoRA": (lambda: adapter(unlike_lora={Q: "its padding"}), {"export"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facts") / "base"
    tiny.llama().save_pretrained(folder)
    return folder


def run(verb: str, made: Path, base: Path, out: Path) -> Any:
    if verb == "merge":
        return merge(base, made, out)
    if verb == "combine":
        return combine([made], [1.0], out, "native")
    return export_adapter(made, out, "lora" if verb == "export" else "native")


def test_every_fact_of_the_table_is_tried() -> None:
    assert MADE.keys() == FACTS.keys()
    assert all(fact.level in LEVELS for fact in FACTS.values())
    assert all(fact.fix for fact in FACTS.values() if fact.level in ("warning", "error"))


@pytest.mark.parametrize("name", FACTS)
def test_no_two_verbs_judge_one_fact_differently(name: str, base: Path, tmp_path: Path) -> None:
    make, refusing = MADE[name]
    fact, whole = FACTS[name], make()
    found = next(f for f in facts_of(whole) if f.name == name)
    (tmp_path / "a").mkdir()
    native.write(whole, tmp_path / "a")
    diagnosis = diagnose(tmp_path / "a", str(base))
    assert found.finding in diagnosis.findings
    assert fact.level != "error" or not diagnosis.is_usable
    for verb in ("merge", "combine", "export", "import"):
        if verb in refusing:
            with pytest.raises(MoSLoRAError) as caught:
                run(verb, tmp_path / "a", base, tmp_path / verb)
            assert verb not in fact.stops or str(caught.value) == f"{found.what} {fact.fix}"
            assert len(str(caught.value).split(". ")) > 1, "it says what to do"
        else:
            assert verb not in fact.stops
            run(verb, tmp_path / "a", base, tmp_path / verb)
            notes = json.loads((tmp_path / verb / PROOF_FILE).read_text())["notes"]
            assert any(note.endswith(f"{found.what} {fact.fix}") for note in notes) == fact.is_said


# --- Advice -------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=tiny.tokens()).logits.double()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def save_lora(base: Path, folder: Path, **changes: Any) -> Any:
    torch.manual_seed(3)
    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    live = get_peft_model(load(base), LoraConfig(**{**settings, **changes}))
    for name, weight in live.named_parameters():
        if weight.requires_grad and "lora_" not in name:
            torch.nn.init.normal_(weight, std=0.1)
    live.save_pretrained(folder, save_embedding_layers=False)
    return live


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / ("adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_modules_without_a_change_are_left_as_the_base_has_them(base: Path, tmp_path: Path) -> None:
    """Experts or towers that no token reached: PEFT merges the rest, and so does merge."""
    live = save_lora(base, tmp_path / "a")
    with torch.no_grad():
        live.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.zero_()
    live.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    proof = merge(base, tmp_path / "a", tmp_path / "out")
    assert proof.modules == 1 and "ΔW is zero in 1 of 2 modules" in proof.notes[0]
    assert relative_error(logits(load(tmp_path / "out")), logits(live)) < MODEL


def test_what_rounding_loses_of_one_module_does_not_stop_the_others(base: Path, tmp_path: Path) -> None:
    load(base).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    save_lora(base, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors = {n: t * 1e-9 if "layers.0" in n and "lora_B" in n else t for n, t in tensors.items()}
    save_file(tensors, file)
    proof = merge(tmp_path / "half", tmp_path / "a", tmp_path / "out")
    assert proof.lost == (Q,) and proof.least_kept == 0
    for layer in (0, 1):
        for name in list(tensors):
            tensors[name] = tensors[name] * (1e-9 if f"layers.{layer}" in name and "lora_B" in name else 1)
    save_file(tensors, file)
    with pytest.raises(ProofError, match=r"that of all other modules.*Merge into a base of higher precision"):
        merge(tmp_path / "half", tmp_path / "a", tmp_path / "none")
    merge(base, tmp_path / "a", tmp_path / "wide")  # the advice


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"bias": "lora_only"},
        {"bias": "all"},
    ],
    ids=str,
)
def test_what_was_trained_whole_is_merged_as_the_gguf_export_advises(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    tiny.llama(attention_bias=True).save_pretrained(tmp_path / "base")
    live = save_lora(tmp_path / "base", tmp_path / "a", **changes)
    if importlib.util.find_spec("gguf"):
        with pytest.raises(AdapterError, match="moslora merge BASE ADAPTER OUT"):
            export_adapter(tmp_path / "a", tmp_path / "a.gguf", "gguf", base=str(tmp_path / "base"))
    proof = merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert proof.replaced
    assert relative_error(logits(load(tmp_path / "out")), logits(live)) < MODEL


def test_a_changed_vocabulary_is_merged_after_the_base_is_resized(base: Path, tmp_path: Path) -> None:
    model = load(base)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "resized")
    live = save_lora(tmp_path / "resized", tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(ModelError, match=r"resize_token_embeddings\(70\)"):
        merge(base, tmp_path / "a", tmp_path / "none")
    merge(tmp_path / "resized", tmp_path / "a", tmp_path / "out")
    assert relative_error(logits(load(tmp_path / "out")), logits(live)) < MODEL


@pytest.mark.parametrize(
    "changes", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_a_tied_head_merges_into_a_base_that_was_untied(changes: dict[str, Any], tmp_path: Path) -> None:
    tiny.llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    live = save_lora(tmp_path / "tied", tmp_path / "a", **changes)
    with pytest.raises((AdapterError, ModelError), match="Untie the base first"):
        merge(tmp_path / "tied", tmp_path / "a", tmp_path / "none")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path / "tied", tie_word_embeddings=False)
    merge(tmp_path / "tied", tmp_path / "a", tmp_path / "out")
    assert relative_error(logits(load(tmp_path / "out")), logits(live)) < MODEL
    levels = {f.check: f.level for f in diagnose(tmp_path / "a", str(tmp_path / "tied")).findings}
    assert "tied" not in levels


def test_rows_of_trained_tokens_are_merged_by_peft_as_merge_advises(base: Path, tmp_path: Path) -> None:
    live = save_lora(base, tmp_path / "a", trainable_token_indices=[3, 5])
    with pytest.raises(AdapterError, match=r"merge_and_unload\(\).*save the model"):
        merge(base, tmp_path / "a", tmp_path / "none")
    wanted = logits(live)
    merged = PeftModel.from_pretrained(load(base), tmp_path / "a").merge_and_unload()
    merged.save_pretrained(tmp_path / "out")
    assert relative_error(logits(load(tmp_path / "out")), wanted) < MODEL


@pytest.mark.parametrize("kind", ["a magnitude", "a bias on B"])
def test_what_merge_cannot_do_is_exported_or_merged_by_peft(kind: str, base: Path, tmp_path: Path) -> None:
    live = save_lora(
        base, tmp_path / "a", **({"use_dora": True} if kind == "a magnitude" else {"lora_bias": True})
    )
    with pytest.raises(AdapterError, match=r"[Ee]xport it --to lora"):
        merge(base, tmp_path / "a", tmp_path / "none")
    export_adapter(tmp_path / "a", tmp_path / "lora")
    assert (
        relative_error(logits(PeftModel.from_pretrained(load(base), tmp_path / "lora")), logits(live)) < MODEL
    )


def test_a_singular_mixer_takes_a_smaller_rank_and_an_alpha_is_mended(base: Path, tmp_path: Path) -> None:
    for name in ("singular mixers", "alpha of zero", "alpha below zero"):
        (tmp_path / name).mkdir()
        native.write(MADE[name][0](), tmp_path / name)
    proof = export_adapter(tmp_path / "singular mixers", tmp_path / "small", rank=4)
    assert proof.rank_error is not None
    for name in ("alpha of zero", "alpha below zero"):
        edit_config(tmp_path / name, lora_alpha=8, alpha_pattern={})
        assert diagnose(tmp_path / name, str(base)).is_usable
        assert not to_say(adapter())
