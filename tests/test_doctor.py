"""What doctor finds, and that it finds nothing where nothing is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.findings import LEVELS
from moslora.adapters.targets import TARGETS as ENGINES
from moslora.adapters.targets import format_for
from moslora.cli import app
from moslora.errors import AdapterError
from moslora.models.fingerprint import fingerprint
from moslora.models.names import resolve_model

TARGETS = ["q_proj", "down_proj"]


def save_adapter(folder: Path, base: str | None = None, **changes: Any) -> Path:
    torch.manual_seed(5)
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, **changes}
    model = get_peft_model(
        tiny.llama(vocab_size=259, max_position_embeddings=256), MoSLoRAConfig(**arguments)
    )
    if base is not None:
        model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def levels(found: Any) -> dict[str, str]:
    """The worst level of each check."""
    worst: dict[str, str] = {}
    for finding in found.findings:
        if LEVELS.index(finding.level) >= LEVELS.index(worst.get(finding.check, "ok")):
            worst[finding.check] = finding.level
    return worst


def test_a_sound_adapter_is_sound_everywhere(tmp_path: Path) -> None:
    base = tiny.save_chat_model(tmp_path / "base")
    save_adapter(tmp_path / "a", str(base), target_modules=[*TARGETS, "v_proj"])
    export_adapter(tmp_path / "a", tmp_path / "lora")
    found = diagnose(tmp_path / "lora", str(base), ["peft", "vllm", "sglang"])
    assert found.applied["vllm"] == found.applied["sglang"] and len(found.applied["vllm"]) == 6
    assert "--lora-target-modules down_proj q_proj v_proj" in found.commands["sglang"]
    assert set(levels(found).values()) <= {"ok", "note"}, found.findings
    assert found.verdict.startswith("Sound for peft, vllm, sglang")


def test_llama_cpp_is_tried_with_a_real_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base = tiny.save_chat_model(tmp_path / "base")
    found = diagnose(save_adapter(tmp_path / "a"), str(base), ["llama.cpp"])
    tried = next(f for f in found.findings if f.check == "llama.cpp: format")
    assert tried.level == "warning" and "--to gguf" in tried.fix and "read back by gguf" in tried.what


def test_every_engine_loads_a_format_that_is_written() -> None:
    from moslora.adapters.formats.table import WRITTEN

    unet = Adapter(
        {"mid_block.resnets.0.conv1": Factors(torch.ones(2, 6), torch.eye(2), torch.ones(5, 2), 1.0)}
    )
    assert {format_for(name, unet) for name in ENGINES} <= set(WRITTEN)


def zero(tensors: dict[str, torch.Tensor], where: str = "") -> None:
    for name, tensor in tensors.items():
        if "moslora_B" in name and where in name:
            tensor.zero_()


# What is done to a native adapter, then the check that must see it, and how loudly.
FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "untrained": (lambda a: edit(a, zero), "trained", "error"),
    "one module untrained": (lambda a: edit(a, lambda t: zero(t, "layers.0.self")), "trained", "warning"),
    "NaN": (lambda a: edit(a, lambda t: next(iter(t.values())).fill_(float("nan"))), "read", "error"),
    "a lost factor": (lambda a: edit(a, lambda t: t.pop(sorted(t)[0])), "read", "error"),
    "a singular mixer": (
        lambda a: edit(a, lambda t: [m[0].zero_() for n, m in t.items() if "moslora_M" in n]),
        "mixer",
        "warning",
    ),
    "cut off": (
        lambda a: (a / "adapter_model.safetensors").write_bytes(
            (a / "adapter_model.safetensors").read_bytes()[:-7]
        ),
        "read",
        "error",
    ),
    "a slip in alpha": (
        lambda a: (a / "adapter_config.json").write_text(
            json.dumps({**json.loads((a / "adapter_config.json").read_text()), "lora_alpha": 800})
        ),
        "scale",
        "warning",
    ),
    "alpha below zero": (
        lambda a: (a / "adapter_config.json").write_text(
            json.dumps({**json.loads((a / "adapter_config.json").read_text()), "lora_alpha": -8})
        ),
        "scale",
        "warning",  # every verb reads it, and PEFT runs it
    ),
    "alpha of zero": (
        lambda a: (a / "adapter_config.json").write_text(
            json.dumps({**json.loads((a / "adapter_config.json").read_text()), "lora_alpha": 0})
        ),
        "scale",
        "error",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_its_check(tmp_path: Path, name: str) -> None:
    harm, check, level = FAULTS[name]
    harm(save_adapter(tmp_path / "a"))
    found = diagnose(tmp_path / "a")
    assert levels(found)[check] == level, found.findings
    assert found.is_usable == (level != "error")


def test_another_base_does_not_fit(tmp_path: Path) -> None:
    tiny.llama(hidden_size=64, vocab_size=259).save_pretrained(tmp_path / "wide")
    tiny.gpt2().save_pretrained(tmp_path / "gpt2")
    save_adapter(tmp_path / "a")
    for base in ("wide", "gpt2"):
        found = diagnose(tmp_path / "a", str(tmp_path / base))
        assert (
            levels(found)["fits"] == "error"
            and "4 of 4 modules" in found.findings[-2].what + found.findings[-1].what
        )


def test_a_tied_head_is_told(tmp_path: Path) -> None:
    tiny.llama(tie_word_embeddings=True, vocab_size=259).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "a", target_modules=["q_proj", "lm_head"])
    found = levels(diagnose(tmp_path / "a", str(tmp_path / "base")))
    assert found["tied"] == "warning" and found["fits"] == "ok"


def test_an_adapter_is_held_against_the_run_it_lies_in(tmp_path: Path) -> None:
    base = tiny.save_chat_model(tmp_path / "base")
    save_adapter(tmp_path / "run" / "adapter")
    template = hashlib.sha256(tiny.CHAT_TEMPLATE.encode()).hexdigest()
    hashes = {
        "chat_template": template,
        "base": {**fingerprint(resolve_model(str(base))), "name": "by another name"},
    }
    (tmp_path / "run" / "run.json").write_text(json.dumps({"hashes": hashes}))
    same = levels(diagnose(tmp_path / "run" / "adapter", str(base)))
    assert same["template"] == "ok" and same["base"] == "ok"
    other = tiny.save_chat_model(tmp_path / "other", seed=9)
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    found = levels(diagnose(tmp_path / "run" / "adapter", str(other)))
    assert found["template"] == "error" and found["base"] == "warning"
    hashes["base"] = {"kind": "hub", "name": "a/b", "method": "commit", "commit": "0" * 40}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"hashes": hashes}))
    assert levels(diagnose(tmp_path / "run" / "adapter", str(base)))["base"] == "note"


def test_what_servers_refuse_is_told_with_a_way_out(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = diagnose(tmp_path / "a", engines=["vllm"])
    refused = next(f for f in found.findings if f.check == "vllm: beside")
    assert refused.level == "error" and "erge" in refused.fix
    save_adapter(tmp_path / "wide", r=40)
    said = next(f for f in diagnose(tmp_path / "wide", engines=["vllm"]).findings if f.check == "vllm: rank")
    assert "--max-lora-rank 64" in said.what


def test_what_a_server_would_leave_out_is_counted(tmp_path: Path) -> None:
    """q_proj alone: SGLang puts q, k and v into one tensor, and fails without v."""
    base = tiny.save_chat_model(tmp_path / "base")
    save_adapter(tmp_path / "a", str(base))
    export_adapter(tmp_path / "a", tmp_path / "lora")
    found = diagnose(tmp_path / "lora", str(base), ["vllm", "sglang"])
    assert set(found.not_applied["sglang"].values()) == {"refused"} and len(found.not_applied["sglang"]) == 2
    assert not found.not_applied["vllm"] and not found.is_usable
    assert next(f for f in found.findings if f.check == "sglang: applied").what.startswith(
        "Of 4 modules none"
    )


def test_a_lora_label_over_a_mixer_is_told(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "a")
    key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_AB.weight"
    edit(tmp_path / "a", lambda t: t.update({key.format(i): torch.eye(4) * 2 for i in range(2)}))
    found = diagnose(tmp_path / "a", engines=["peft"])
    assert levels(found)["label"] == "warning" and "moslora import" in found.findings[1].fix


def test_wrong_usage_is_no_diagnosis(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        diagnose(tmp_path / "nothing")
    with pytest.raises(ValueError, match="Did you mean 'vllm'"):
        diagnose(save_adapter(tmp_path / "a"), engines=["vlm"])


def test_the_exit_code_is_the_verdict(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a")
    sound = CliRunner().invoke(app, ["doctor", str(tmp_path / "a")])
    assert sound.exit_code == 0 and "Sound" in sound.output
    edit(tmp_path / "a", zero)
    broken = CliRunner().invoke(app, ["doctor", str(tmp_path / "a"), "--json"])
    assert broken.exit_code == 1 and json.loads(broken.output)["usable"] is False
    assert CliRunner().invoke(app, ["doctor", str(tmp_path / "none")]).exit_code == 2
