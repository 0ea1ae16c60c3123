"""Which versions of PEFT, transformers and TRL are served, and what happens with others."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import peft.utils
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM

import laws
import moslora
import tiny
import upstream
from moslora import MoSLoRAConfig, errors, versions
from moslora.compat.lookup import holders_of
from moslora.compat.peft import base_layer, base_tuner, patches, quantization, state_dict, state_hooks
from moslora.compat.peft.functions import prune
from moslora.recipe.loading import load_recipe
from moslora.tasks import find_task
from moslora.tuner import held_mixer, registration
from tolerances import MODEL, relative_error

ROOT = Path(__file__).parents[1]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def versions_are(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let other versions be installed, and nothing be told yet."""

    def pretend(**found: str) -> None:
        known = versions.installed
        monkeypatch.setattr(versions, "installed", lambda package: found.get(package) or known(package))
        monkeypatch.setattr(versions, "_told", [])

    return pretend


# ---- ranges ----------


def test_pyproject_asks_for_the_versions_that_are_known() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package, (first, beyond) in versions.KNOWN.items():
        assert f"{package}>={first},<{beyond}" in project["dependencies"]
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in project["classifiers"]


def test_the_lowest_constraints_are_of_the_lowest_versions() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    for package, (first, _) in versions.KNOWN.items():
        assert versions.numbers(pinned[package])[:2] == versions.numbers(first)


def test_what_is_left_out_with_old_versions_is_there_and_has_a_reason() -> None:
    for name, (reason, least) in upstream.LEFT_OUT.items():
        assert (ROOT / "tests" / name).is_file() and reason and least, name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.21.2", (0, 21, 2)), ("6.0.0.dev0", (6, 0, 0)), ("5.0rc1", (5, 0)), ("main", ())],
)
def test_a_version_is_read_up_to_what_is_no_number(text: str, expected: tuple[int, ...]) -> None:
    assert versions.numbers(text) == expected


# ---- what is not known ----------


def test_what_is_installed_is_known_and_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check()
    assert versions.unknown() == []


@pytest.mark.parametrize(
    ("package", "version"), [("peft", "0.22.0"), ("transformers", "6.0.0"), ("trl", "2.1")]
)
def test_an_unknown_version_is_one_warning(versions_are: Any, package: str, version: str) -> None:
    versions_are(**{package: version})
    with pytest.warns(UserWarning, match=rf"does not know {package} {version}.*pip install '") as said:
        versions.check()
        versions.check()
        moslora._register()
    assert len(said) == 1


def test_several_unknown_versions_are_one_warning_together(versions_are: Any) -> None:
    versions_are(peft="0.23", trl="2.0")
    with pytest.warns(UserWarning, match=r"peft 0\.23 .* and trl 2\.0") as said:
        versions.check()
    assert len(said) == 1


def test_the_warning_comes_when_the_package_is_imported() -> None:
    script = """
import importlib.metadata as m, warnings
real = m.version
m.version = lambda name: "0.99" if name == "peft" else real(name)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import moslora, peft
    from moslora import MoSLoRAConfig
print([str(w.message) for w in said if "moslora does not know" in str(w.message)])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("peft 0.99") == 1, done.stdout


def test_an_unknown_version_that_cannot_be_registered_with_is_a_warning_and_a_known_one_an_error(
    versions_are: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise AttributeError("hotswap is gone")

    monkeypatch.setattr(registration, "register", fail)
    with pytest.raises(AttributeError, match="hotswap is gone"):
        moslora._register()
    versions_are(peft="0.30")
    with pytest.warns(UserWarning, match=r"could not register.*AttributeError: hotswap is gone.*pip install"):
        moslora._register()


def test_a_failure_to_register_is_said_beside_the_version_that_is_not_known() -> None:
    script = """
import importlib.metadata as m, warnings
real = m.version
m.version = lambda name: "0.99" if name == "peft" else real(name)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import peft, peft.tuners.tuners_utils as utils
    del utils.check_adapters_to_merge
    import moslora
print(*(str(w.message) for w in said if "moslora" in str(w.message)), sep="\\n")
print("MOSLORA" in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    unknown, failed, is_known = done.stdout.splitlines()
    assert "Most things may work" in unknown and is_known == "False"
    assert "could not register" in failed and "cannot be made or loaded. Install what" in failed


def test_a_function_that_is_not_where_it_was_is_a_warning(
    versions_are: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions_are()
    moved = (
        ("peft.utils.hotswap", "no_such_function", lambda found: found, True),
        ("peft.no_such_module", "function", lambda found: found, True),
        ("peft.utils.hotswap", "not_in_this_version", lambda found: found, False),
    )
    monkeypatch.setattr(patches, "CHANGES", (*patches.CHANGES, *moved))
    with pytest.warns(
        UserWarning, match=r"hotswap\.no_such_function, peft\.no_such_module\.function"
    ) as said:
        patches.patch(registration.OWN_METHODS)
        patches.patch(registration.OWN_METHODS)
    assert len(said) == 1 and "not_in_this_version" not in str(said[0].message)


# ---- the command ----------


@pytest.mark.parametrize("use", [lambda: find_task("text"), lambda: load_recipe(["recipe.yaml"])])
def test_the_command_says_which_versions_it_needs_before_anything_else(versions_are: Any, use: Any) -> None:
    versions_are(peft="0.18.1", transformers="4.57.1", trl="1.0.0")
    match = (
        r"peft 0\.21 or later \(0\.18\.1 is installed\), transformers 5\.20.*trl 1\.16.*pip install.*library"
    )
    with pytest.raises(errors.VersionError, match=match):
        use()


# ---- PEFT without hooks for the names in files ----------


@pytest.fixture
def without_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save and load through what stands in for the hooks that PEFT has since 0.21; with older ones it does anyway."""
    if not state_hooks.HAS_STATE_HOOKS:
        return
    for name in (
        "_get_adapter_state_dict",
        "_remove_adapter_name_from_key",
        "_remap_adapter_state_dict_for_load",
    ):
        monkeypatch.setattr(base_tuner.Tuner, name, vars(state_hooks.StateHooks)[name], raising=False)
    changes = (
        ("get_peft_model_state_dict", state_dict.get_state_through_tuner),
        ("set_peft_model_state_dict", state_dict.set_state_through_tuner),
    )
    for name, change in changes:
        now = getattr(peft.utils, name)
        for holder in holders_of(now, name):
            monkeypatch.setattr(holder, name, change(now))


def adapted(build: Any = tiny.llama, **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **changes}
    return get_peft_model(build(), MoSLoRAConfig(**settings)).eval()


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(tiny.tokens(), use_cache=False).logits


WHOLE = {
    "factors": {},
    "magnitudes": {"use_dora": True},
    "biases on B": {"lora_bias": True},
    "a start from the base": {"init_lora_weights": "pissa"},
    "modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 5]},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:lora_bias=True adapts:UserWarning")
@pytest.mark.usefixtures("without_hooks")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("changes", WHOLE.values(), ids=WHOLE)
def test_without_hooks_the_same_file_is_written_and_gives_the_same_bits(
    changes: dict[str, Any], low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model = adapted(**changes)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05)
    if "trainable_token_indices" not in changes:  # which PEFT asks every adapter for, once one has them
        model.add_adapter("other", MoSLoRAConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert keys == peft.get_peft_model_state_dict(model).keys()
    assert not any("default" in key or "other" in key or held_mixer.STARTS in key for key in keys)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(run(again), run(model))
    named = PeftModel.from_pretrained(tiny.llama(), tmp_path, adapter_name="second").eval()
    assert torch.equal(run(named), run(model))
    assert all(
        (tmp_path / n / "adapter_model.safetensors").is_file() for n in model.peft_config if n == "other"
    )


@pytest.mark.usefixtures("without_hooks")
def test_without_hooks_a_split_mixer_is_saved_as_m_and_goes_on(tmp_path: Path) -> None:
    model = adapted().to(torch.bfloat16).train()
    starts = [n for n, _ in model.named_parameters() if held_mixer.STARTS in n]
    assert starts
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    M = layer.factors("default")[1]
    assert torch.equal(stored["base_model.model.model.layers.0.self_attn.q_proj.moslora_M.weight"], M)
    again = adapted().to(torch.bfloat16).train()
    peft.set_peft_model_state_dict(again, stored)
    assert torch.equal(again.get_base_model().model.layers[0].self_attn.q_proj.factors("default")[1], M)


@pytest.mark.usefixtures("without_hooks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, key: t.pop(key), "missing from the checkpoint"),
        (lambda t, key: t.update({key: t[key][:3, :3].clone()}), "the model needs"),
        (lambda t, key: t.update({key: t[key] * float("nan")}), "NaN or infinite"),
        (
            lambda t, key: t.update({key.replace("layers.0", "layers.9"): t[key].clone()}),
            "fits no adapted module",
        ),
    ],
)
def test_without_hooks_a_checkpoint_that_does_not_fit_is_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, "base_model.model.model.layers.0.self_attn.q_proj.moslora_M.weight")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


@pytest.mark.usefixtures("without_hooks")
def test_without_hooks_transformers_own_methods_save_and_load(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny.llama().eval()
    model.add_adapter(MoSLoRAConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    model.eval().save_pretrained(tmp_path)
    again = tiny.llama().eval()
    again.load_adapter(str(tmp_path))
    assert torch.equal(run(again.eval()), run(model))


@pytest.mark.usefixtures("without_hooks")
def test_without_hooks_lora_is_saved_and_loaded_by_peft_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=TARGETS, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()), run(model))


def test_a_function_is_found_in_every_module_that_holds_it() -> None:
    holders = {
        module.__name__ for module in holders_of(peft.get_peft_model_state_dict, "get_peft_model_state_dict")
    }
    assert {"peft", "peft.utils", "peft.utils.save_and_load", "peft.peft_model"} <= holders


# ---- what is frozen ----------


def trained(model: nn.Module, kind: str, adapter: str) -> set[bool]:
    return {p.requires_grad for n, p in model.named_parameters() if f".{kind}.{adapter}." in n}


def test_what_is_frozen_stays_so_whatever_is_activated() -> None:
    model = adapted(train_mixer=False)
    model.add_adapter("other", MoSLoRAConfig(r=2, target_modules=TARGETS))
    for name, learned in (("other", True), ("default", False), ("other", True)):
        model.set_adapter(name)
        assert trained(model, "moslora_A", name) == {True}
        assert trained(model, "moslora_M", name) == {learned}
    for layer in (m for m in model.modules() if isinstance(m, moslora.tuner.layer.MoSLoRALayer)):
        layer.set_requires_grad("default", True)
        layer.set_requires_grad("other", False)
    assert trained(model, "moslora_M", "default") == trained(model, "moslora_A", "other") == {False}
    assert trained(model, "moslora_A", "default") == {True}


def test_an_adapter_for_inference_and_the_start_of_a_split_mixer_are_not_trained(tmp_path: Path) -> None:
    model = adapted().to(torch.bfloat16).train()
    model.set_adapter("default")
    assert not any(p.requires_grad for n, p in model.named_parameters() if held_mixer.STARTS in n)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_what_stands_in_for_pefts_freezing_freezes_and_forgets() -> None:
    class Base:
        def __init__(self) -> None:
            self.A, self.M = (nn.ModuleDict({n: nn.Linear(2, 2) for n in "ab"}) for _ in range(2))

        def set_adapter(self, names: Any, inference_mode: bool = False) -> None:
            for name in "ab":
                self.A[name].requires_grad_(name in names)
                self.M[name].requires_grad_(name in names)

        def set_requires_grad(self, names: Any, requires_grad: bool = True) -> None:
            for name in names:
                self.M[name].requires_grad_(requires_grad)

        def delete_adapter(self, name: str) -> None:
            del self.A[name], self.M[name]

    class Layer(base_layer.Frozen, Base):
        pass

    layer = Layer()
    layer.frozen_peft_weight_names = {"a": ("M",)}
    layer.set_adapter(["a", "b"])
    assert layer.A["a"].weight.requires_grad and layer.M["b"].weight.requires_grad
    assert not layer.M["a"].weight.requires_grad
    layer.set_requires_grad(["a"])
    assert not layer.M["a"].weight.requires_grad
    layer.delete_adapter("a")
    assert layer.frozen_peft_weight_names == {}


# ---- quantized bases without backends ----------


class Int8Weight(nn.Parameter):
    """A weight of a class that a package for quantization has."""


Int8Weight.__module__ = "bitsandbytes.nn.modules"


def test_without_backends_a_quantized_layer_is_known_and_nothing_is_written_into_it(
    versions_are: Any,
) -> None:
    versions_are(peft="0.18.1")
    plain = nn.Linear(4, 4)
    assert quantization.resolve_read_only(plain) is None
    plain.weight = Int8Weight(plain.weight.data, requires_grad=False)
    backend = quantization.resolve_read_only(plain)
    assert backend.backend_name == "bitsandbytes" and not backend.supports_merge
    match = r"Merging into a Linear of bitsandbytes needs peft 0\.20.*0\.18\.1.*export"
    layer = type("Layer", (), {"get_base_layer": lambda self: plain})()
    with pytest.raises(ValueError, match=match):
        backend.set_base_weight(layer, plain.weight)


def test_without_backends_merging_is_refused_and_training_works(
    versions_are: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions_are(peft="0.18.1")
    monkeypatch.setattr(quantization, "resolve_quantization_backend", quantization.resolve_read_only)
    base = nn.Sequential(nn.Linear(4, 4))
    base[0].weight = Int8Weight(base[0].weight.data, requires_grad=False)
    model = get_peft_model(base, MoSLoRAConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    assert all(p.grad is not None for p in laws.factors_by_key(model).values())
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"Merging into a Linear of bitsandbytes needs peft 0\.20"):
            merge()
    assert torch.equal(model(x), expected)


# ---- what is refused with older ones, or put right ----------


def test_pruning_at_random_keeps_the_mean_with_every_version() -> None:
    torch.manual_seed(0)
    pruned = prune(torch.ones(10000), 0.25, "random", rescale=True)
    assert set(pruned.tolist()) == {0.0, 4.0}
    assert set(prune(torch.ones(10000), 0.25, "random").tolist()) == {0.0, 1.0}


@pytest.mark.skipif(base_tuner.HAS_TIES, reason="PEFT ties adapters since 0.19")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_before_ties_of_adapters_they_are_refused_with_the_version_that_has_them() -> None:
    with pytest.raises(ValueError, match=r"ensure_weight_tying=True with .* needs peft 0\.19"):
        adapted(
            lambda: tiny.llama(tie_word_embeddings=True),
            target_modules=["embed_tokens"],
            ensure_weight_tying=True,
        )


def gpt_oss() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
    }
    model = GptOssForCausalLM(
        GptOssConfig(
            **sizes, **heads, layer_types=["full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
    ).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def test_one_adapter_of_experts_is_saved_loaded_and_merged_with_every_version(tmp_path: Path) -> None:
    model = adapted(
        gpt_oss, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    expected = run(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(gpt_oss(), tmp_path).eval()), expected)
    second = MoSLoRAConfig(r=4, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    if not versions.is_at_least("peft", "0.20"):
        with pytest.raises(ValueError, match=r"second adapter with target_parameters needs peft 0\.20"):
            model.add_adapter("other", second)
    assert relative_error(run(model.merge_and_unload()), expected) < MODEL


def test_an_adapter_that_is_merged_is_not_deleted() -> None:
    model = adapted()
    model.add_adapter("other", MoSLoRAConfig(r=2, target_modules=TARGETS))
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
