"""What the rules of engines say: each rule of each file on an adapter that it is about, and what is asked of none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from moslora.adapters.engines.predict import FIXES, predict
from moslora.adapters.engines.rules import OUTCOMES, Model, Names, read_engine
from moslora.adapters.engines.traits import TRAITS
from moslora.adapters.factors import Adapter, Begun, Factors, Form
from moslora.adapters.formats.experts import EXPERT
from moslora.adapters.targets import TARGETS

LAYER = "model.layers.0."
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
EXPERTS = f"{LAYER}mlp.experts"


def factors(form: Form = Form(), r: int = 2, **more: Any) -> Factors:  # noqa: B008  frozen
    return Factors(torch.ones(r, 4), torch.eye(r), torch.ones(4, r), 1.0, form, **more)


def adapter(*paths: str, form: Form = Form(), **config: Any) -> Adapter:  # noqa: B008  frozen
    return Adapter({path: factors(form) for path in paths}, {"r": 2, "lora_alpha": 2, **config})


PLAIN = adapter(*(f"{LAYER}{name}" for name in ATTENTION))
Q = f"{LAYER}self_attn.q_proj"


def with_q(**more: Any) -> Adapter:
    return replace(PLAIN, modules={**PLAIN.modules, Q: factors(**more)})


# An adapter that has each trait.
HAVING: Mapping[str, Adapter] = {
    "any": PLAIN,
    "DoRA": with_q(magnitude=torch.ones(4)),
    "bias on B": with_q(bias=torch.ones(4)),
    "tensors beside": replace(PLAIN, extra={"base_model.model.lm_head.weight": torch.ones(1)}),
    "ranks that differ": with_q(r=3),
    "scale of rsLoRA": replace(PLAIN, config={**PLAIN.config, "use_rslora": True}),
    "alphas that differ": replace(
        PLAIN,
        modules={**PLAIN.modules, Q: replace(factors(), scale=2.0)},
        config={**PLAIN.config, "alpha_pattern": {"q_proj": 4}},
    ),
    "targets as a pattern": replace(PLAIN, config={**PLAIN.config, "target_modules": ".*_proj"}),
    "start": replace(PLAIN, begun=Begun("PiSSA", "base", False, 0.0, 0.0)),
    "convolution": adapter("model.conv1", form=Form("conv", (3, 3))),
    "embedding": adapter("model.embed_tokens", form=Form("embedding")),
    "head": adapter("lm_head"),
    "experts together": adapter(
        *(f"{EXPERTS}{part}[{e}]" for e in (0, 1) for part in ("", ".base_layer")), form=EXPERT
    ),
    "experts apart": adapter(
        *(f"{EXPERTS}.{e}.{part}" for e in (0, 1) for part in ("gate_proj", "up_proj", "down_proj"))
    ),
    "incomplete experts": adapter(f"{EXPERTS}.0.gate_proj", f"{EXPERTS}.1.down_proj"),
    "half of the experts": adapter(*(f"{EXPERTS}[{e}]" for e in (0, 1)), form=EXPERT),
    "shared experts": adapter(f"{LAYER}mlp.shared_expert.up_proj", f"{LAYER}mlp.shared_expert.gate_proj"),
    "router": adapter(f"{LAYER}mlp.gate"),
    "tower": adapter("model.visual.blocks.0.attn.qkv"),
    "layers of a tower": adapter("model.vision_tower.encoder.layers.0.self_attn.q_proj"),
    "q, k or v without q and v": adapter(Q),
    "up without gate": adapter(f"{LAYER}mlp.up_proj"),
    "unknown to ComfyUI": adapter("down_blocks.0.attentions.0.transformer_blocks.0.norm1"),
}


def test_every_trait_has_an_adapter_and_is_seen_in_it() -> None:
    assert HAVING.keys() == TRAITS.keys()
    for name, having in HAVING.items():
        assert TRAITS[name](having), name
        if name != "any":
            assert not TRAITS[name](PLAIN), name


RULES = [
    pytest.param(key, number, id=f"{key}-{number}-{rule.check}")
    for key in TARGETS
    for number, rule in enumerate(read_engine(key).rules)
]


@pytest.mark.parametrize(("key", "number"), RULES)
def test_a_rule_says_what_becomes_of_the_modules_that_it_is_about(
    key: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rule alone, so that no other says it first; with the model that it wants."""
    engine = read_engine(key)
    rule = engine.rules[number]
    model = Model(**{"file": "models/one.py", **rule.where})
    alone = replace(engine, rules=(rule,), models={"One": model}, rank={}, targets={})
    monkeypatch.setattr("moslora.adapters.engines.predict.read_engine", lambda _: alone)
    having = HAVING[rule.of] if rule.of != "any" else adapter("model.layers.0.mixer.conv_gate")
    found = predict(key, having, {"architectures": ["One"]})
    said = [one for one in found.findings if one.check == rule.check]
    assert said and said[0].level == OUTCOMES[rule.outcome], found.findings
    assert rule.source in said[0].what and engine.version in said[0].what and "{" not in said[0].what
    assert "{" not in said[0].fix and (not rule.fix or said[0].fix)
    if OUTCOMES[rule.outcome] == "error":
        assert set(found.lost.values()) == {rule.outcome} and not found.command
    if rule.where:
        other = replace(alone, models={"One": Model(experts="?", lora=False)})
        monkeypatch.setattr("moslora.adapters.engines.predict.read_engine", lambda _: other)
        assert not any(
            one.check == rule.check for one in predict(key, having, {"architectures": ["One"]}).findings
        )


@pytest.mark.parametrize("key", TARGETS)
def test_a_plain_adapter_is_applied_whole_with_a_command(key: str) -> None:
    found = predict(key, PLAIN, {"architectures": ["LlamaForCausalLM"]})
    if key not in ("comfyui", "diffusers"):
        assert found.is_whole and "ADAPTER" in found.command and not found.faults
    assert found.version == read_engine(key).version


def test_fixes_are_sentences_or_keys() -> None:
    for key in TARGETS:
        for rule in read_engine(key).rules:
            assert rule.fix in FIXES or not rule.fix or rule.fix.endswith("."), rule


# --- Options


def test_the_rank_asks_for_the_next_step_and_is_refused_above_the_last() -> None:
    for r, flag in ((16, ""), (17, " --max-lora-rank 32"), (300, " --max-lora-rank 320")):
        found = predict("vllm", Adapter({Q: factors(r=r)}))
        assert found.command == f"vllm serve MODEL --enable-lora --lora-modules tuned=ADAPTER{flag}"
    assert set(predict("vllm", Adapter({Q: factors(r=513)})).lost.values()) == {"refused"}
    command = predict("sglang", PLAIN).command
    assert command.endswith("--max-lora-rank 2 --lora-target-modules k_proj o_proj q_proj v_proj")


# --- Names


@pytest.mark.parametrize(
    ("architecture", "path", "fate"),
    [
        ("LlamaForCausalLM", Q, ""),
        ("LlamaForCausalLM", "lm_head", ""),
        ("Qwen2ForCausalLM", "lm_head", "refused"),
        ("Qwen2_5_VLForConditionalGeneration", "model.language_model.layers.0.self_attn.q_proj", ""),
        ("Qwen2_5_VLForConditionalGeneration", "model.layers.0.self_attn.q_proj", ""),
        ("Gemma3ForConditionalGeneration", "model.language_model.layers.0.self_attn.q_proj", ""),
        ("Gemma3ForConditionalGeneration", "language_model.model.layers.0.self_attn.q_proj", ""),
        ("Gemma3ForConditionalGeneration", "model.layers.0.self_attn.q_proj", ""),
        ("Gemma3ForConditionalGeneration", "decoder.layers.0.self_attn.q_proj", "left out"),
        ("Qwen2_5_VLForConditionalGeneration", "model.visual.blocks.0.attn.qkv", "flag"),
        ("BloomForCausalLM", "transformer.h.0.self_attention.query_key_value", "refused"),
    ],
)
def test_names_are_held_against_vllms_model(architecture: str, path: str, fate: str) -> None:
    found = predict("vllm", adapter(path), {"architectures": [architecture]})
    if fate == "flag":
        assert found.flags == ("--enable-tower-connector-lora",) and found.is_whole
    else:
        assert found.lost.get(path, "") == fate, found.findings


def test_an_architecture_that_was_not_read_is_said() -> None:
    found = predict("vllm", PLAIN, {"architectures": ["OneOfMyOwn"]})
    assert found.is_whole and len(found.unsure) == 4
    assert found.findings[0].level == "warning" and "OneOfMyOwn is not among" in found.findings[0].what


def test_names_are_changed_in_order_and_once() -> None:
    names = Names(
        regex={r"^h\.(\d+)": r"layers.\1"},
        substr={".attn.": ".self_attn."},
        prefix={"layers.": "model.layers.", "mtp.": None},
        suffix={".c.lora_A.weight": ".d.lora_A.weight"},
    )
    assert names.rename("h.3.attn.c") == "model.layers.3.self_attn.d"
    assert names.rename("mtp.attn.c") is None


def test_a_file_with_a_word_that_no_rule_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from moslora.adapters.engines import rules

    with pytest.raises(ValueError, match="is not a field of Rule"):
        rules._made(rules.Rule, {"chekc": "a slip"}, "vllm.yaml")
