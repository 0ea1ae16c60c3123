"""LoRA's arguments mean what they mean in LoRA: the same modules, ranks, scales and trained parameters."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_configs
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import laws
import tiny
import upstream
from moslora import MoSLoRAConfig
from moslora.adapters.export import export_adapter
from moslora.adapters.merge import merge
from moslora.tuner.refused import REFUSED_ARGUMENTS, REFUSED_STARTS
from tolerances import MODEL, RELATIVE, relative_error

ATTENTION = ["q_proj", "v_proj"]


def run(model: nn.Module) -> Tensor:
    return model(tiny.tokens()).logits


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": r".*\.layers\.1\..*(q_proj|up_proj)"},
        {"target_modules": ATTENTION, "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ATTENTION, "layers_to_transform": 1},
        {"target_modules": ATTENTION, "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ATTENTION, "rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {"v_proj": 32}},
        {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "norm"]},
        {"target_modules": ATTENTION, "trainable_token_indices": [3, 5]},
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
    ],
    ids=str,
)
def test_an_argument_means_what_it_means_in_lora(settings: dict[str, object]) -> None:
    laws.same_targets(tiny.llama, task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_biases_are_trained_as_in_lora(bias: str) -> None:
    laws.same_targets(tiny.gpt2, target_modules=["c_attn"], bias=bias, fan_in_fan_out=True)


TRAINED_BESIDE = {
    "tokens": {"trainable_token_indices": [3, 5]},
    "module": {"modules_to_save": ["embed_tokens"]},
    "tied module": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's, of both
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("beside", TRAINED_BESIDE)
def test_what_is_trained_beside_the_factors_is_trained_as_in_lora_and_travels(
    beside: str, tmp_path: Path
) -> None:
    """On a base whose head is tied to its embedding, which is where it could go wrong."""
    settings = {"target_modules": ATTENTION, **TRAINED_BESIDE[beside]}
    tied = lambda: tiny.llama(tie_word_embeddings=True)  # noqa: E731
    trained = []
    for cls, own in ((MoSLoRAConfig, {"mixer": "identity", "train_mixer": False}), (LoraConfig, {})):
        model = laws.adapt(tied, cls, **settings, **own, init_lora_weights=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for seed in range(3):
            ids = tiny.tokens(seed=seed)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model)
    ours, lora = trained
    with torch.no_grad():
        expected = run(ours)
        assert relative_error(expected, run(lora)) < MODEL
        assert relative_error(run(tied()), expected) > 100 * MODEL
        ours.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tied(), tmp_path)
        assert torch.equal(run(loaded), expected)
        export_adapter(tmp_path, tmp_path / "lora")
        plain = PeftModel.from_pretrained(tied(), tmp_path / "lora")
        assert type(plain.peft_config["default"]) is LoraConfig
        assert relative_error(run(plain), expected) < MODEL
        merged = loaded.merge_and_unload()
        assert relative_error(run(merged), expected) < MODEL
        if beside != "module":  # without ensure_weight_tying the embedding alone was trained
            assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@torch.no_grad()
def test_one_side_of_a_tie_is_adapted_as_in_lora_and_the_tie_is_left_alone(
    target: str, tmp_path: Path
) -> None:
    tied = lambda: tiny.llama(tie_word_embeddings=True)  # noqa: E731
    laws.same_targets(tied, target_modules=[target])
    model = laws.adapt(tied, target_modules=[target])
    expected = run(model)
    inner = model.get_base_model()
    embedding, head = (
        m.base_layer if hasattr(m, "base_layer") else m for m in (inner.model.embed_tokens, inner.lm_head)
    )
    assert embedding.weight is head.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(tied(), tmp_path)), expected)
    for act in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"shares its weight.*Untie"):
            act()
    assert torch.equal(run(model), expected)
    unloaded = model.unload()
    assert unloaded.lm_head.weight is unloaded.model.embed_tokens.weight


# ---- tied adapters -------------------------------------------------------------------------------------------

ties = upstream.needs("PEFT ties no adapters before", peft="0.19")
TIED = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
without_config = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT's


def tied_llama() -> nn.Module:
    return tiny.llama(tie_word_embeddings=True)


def trained_tied(cls: type = MoSLoRAConfig, **changes: object) -> nn.Module:
    model = laws.adapt(tied_llama, cls, **{**TIED, "init_lora_weights": True, **changes}).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for seed in range(3):
        ids = tiny.tokens(seed=seed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@ties
@without_config
@torch.no_grad()
def test_tied_adapters_of_embedding_and_head_are_trained_as_in_lora_and_travel(tmp_path: Path) -> None:
    with torch.enable_grad():
        ours = trained_tied(mixer="identity", train_mixer=False)
        lora = trained_tied(LoraConfig)
    expected, base = run(ours), run(tied_llama())
    assert relative_error(expected, run(lora)) < MODEL and relative_error(base, expected) > 100 * MODEL
    with torch.enable_grad():
        ours = trained_tied()
    expected = run(ours)
    head = ours.get_base_model().lm_head
    source = ours.get_base_model().model.embed_tokens
    deltas = [layer.get_delta_weight("default") for layer in (head, source)]
    assert relative_error(*deltas) < RELATIVE[torch.float32]
    assert not any("lm_head.moslora" in name for name, _ in ours.named_parameters())
    twin = copy.deepcopy(ours)
    for p in laws.factors_by_key(twin).values():
        p.zero_()
    assert relative_error(run(twin), base) < MODEL and torch.equal(run(ours), expected)
    ours.save_pretrained(tmp_path / "native")
    for low_cpu_mem_usage in (True, False):  # with True, PEFT unties the base (as with LoRA)
        loaded = PeftModel.from_pretrained(
            tied_llama(), tmp_path / "native", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(run(loaded), expected) and loaded.get_base_model().lm_head.tied
    alone = tied_llama()
    alone.load_adapter(str(tmp_path / "native"))
    assert torch.equal(run(alone), expected)
    alone.save_pretrained(tmp_path / "alone")
    assert torch.equal(run(PeftModel.from_pretrained(tied_llama(), tmp_path / "alone")), expected)
    export_adapter(tmp_path / "native", tmp_path / "lora")
    with pytest.warns(
        UserWarning, match="ensure_weight_tying"
    ):  # PEFT's: in files each has factors of its own
        plain = PeftModel.from_pretrained(tied_llama(), tmp_path / "lora")
    assert type(plain.peft_config["default"]) is LoraConfig
    assert relative_error(run(plain), expected) < MODEL
    torch._dynamo.reset()
    compiled = torch.compile(loaded, fullgraph=True, backend="eager")
    assert relative_error(compiled(tiny.tokens(), use_cache=False).logits, expected) < MODEL
    loaded.merge_adapter()
    assert relative_error(run(loaded), expected) < MODEL
    loaded.unmerge_adapter()
    assert relative_error(run(loaded), expected) < MODEL
    merged = loaded.merge_and_unload(safe_merge=True)
    assert relative_error(run(merged), expected) < MODEL
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@ties
@without_config
@torch.no_grad()
def test_tied_adapters_are_merged_on_disk_into_the_weight_that_is_shared(tmp_path: Path) -> None:
    with torch.enable_grad():
        ours = trained_tied()
    ours.save_pretrained(tmp_path / "native")
    tied_llama().save_pretrained(tmp_path / "base")
    export_adapter(tmp_path / "native", tmp_path / "lora")
    for name in ("native", "lora"):
        merge(str(tmp_path / "base"), tmp_path / name, tmp_path / f"merged-{name}")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{name}")
        assert relative_error(run(merged), run(ours)) < MODEL


@ties
@without_config
@torch.no_grad()
def test_tied_adapters_are_switched_summed_swapped_widened_and_deleted_as_others_are(tmp_path: Path) -> None:
    with torch.enable_grad():
        model = trained_tied()
    one = run(model)
    model.add_adapter("other", MoSLoRAConfig(r=2, lora_alpha=3, init_lora_weights=False, **TIED))
    model.set_adapter("other")
    other = run(model)
    mixed = model(tiny.tokens(), adapter_names=["default", "other"]).logits
    for row, alone in enumerate((one, other)):
        assert relative_error(mixed[row], alone[row]) < MODEL
    model.base_model.set_adapter(["default", "other"])
    both = run(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert relative_error(run(model), both) < MODEL
    model.save_pretrained(tmp_path, selected_adapters=["other", "sum"])
    again = PeftModel.from_pretrained(tied_llama(), tmp_path / "sum")
    assert relative_error(run(again), both) < MODEL and again.get_base_model().lm_head.tied
    model.set_adapter("default")
    for name in ("sum", "other"):
        model.delete_adapter(name)
    assert relative_error(run(model), one) < MODEL
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert relative_error(run(model), one) < MODEL
    hotswap_adapter(model, tmp_path / "other", adapter_name="default")
    assert relative_error(run(model), other) < MODEL


@ties
@without_config
def test_a_file_whose_head_is_not_the_embeddings_is_not_loaded_as_tied(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ensure_weight_tying"):  # PEFT's, of what is then done
        apart = laws.adapt(tied_llama, target_modules=["embed_tokens", "lm_head"])
    apart.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "ensure_weight_tying": True}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"(?s)nothing was loaded.*lm_head.*to which it is tied"):
        PeftModel.from_pretrained(tied_llama(), tmp_path)


@ties
def test_tying_is_refused_where_factors_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match=r"use_dora=True cannot tie.*lm_head"):
        laws.adapt(tied_llama, use_dora=True, **TIED)
    with pytest.raises(ValueError, match=r"lm_head cannot be tied.*exclude_modules"):
        laws.adapt(tied_llama, exclude_modules=["embed_tokens"], **TIED)


def test_target_parameters_that_are_no_list_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a list"):
        MoSLoRAConfig(target_parameters="experts.down_proj")


# ---- arguments that LoRA has and MoSLoRA refuses -------------------------------------------------------------

LORA_FIELDS = {field.name: field for field in dataclasses.fields(LoraConfig)}


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


@pytest.mark.parametrize("name", LORA_FIELDS)
def test_every_field_of_the_installed_lora_config_is_accepted_at_its_default(name: str) -> None:
    """A field that a new PEFT adds fails here: support it, or give it a row in tuner/refused.py."""
    config = MoSLoRAConfig(**{name: default_of(LORA_FIELDS[name])})
    assert (name in config.to_dict()) == (name not in REFUSED_ARGUMENTS)


def test_a_whole_lora_configuration_is_accepted_as_it_is_read_from_its_file() -> None:
    values = LoraConfig(r=4, target_modules=["q_proj"]).to_dict()
    config = MoSLoRAConfig(**json.loads(json.dumps({**values, "target_modules": ["q_proj"]})))
    assert (config.r, config.target_modules, config.peft_type.value) == (4, {"q_proj"}, "MOSLORA")


def made(kind: str, **arguments: Any) -> Any:
    """A sub-configuration, or None where the installed PEFT has none of its kind."""
    known = getattr(lora_configs, kind, None)
    return known and known(**arguments)


SET = {
    "layer_replication": [(0, 1)],
    "corda_config": made("CordaConfig", corda_method="kpm"),
    "lora_ga_config": made("LoraGAConfig", scale="unit"),
    "runtime_config": made("LoraRuntimeConfig", ephemeral_gpu_offload=True),
    "velora_config": made("VeloraConfig"),
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": made("MontecloraConfig"),
    "use_bdlora": made("BdLoraConfig"),
    "arrow_config": made("ArrowConfig"),
    "kasa_config": made("KasaConfig"),
    "megatron_config": {"hidden_size": 8},
}


def test_every_refused_argument_has_a_value_that_is_refused_here() -> None:
    ignored = {"qalora_group_size", "megatron_core"}  # what would switch them on is refused
    assert set(SET) | ignored == set(REFUSED_ARGUMENTS)
    assert MoSLoRAConfig(qalora_group_size=4, megatron_core="another").r == 8


@pytest.mark.parametrize("name", [name for name, value in SET.items() if value is not None])
def test_an_argument_that_cannot_be_used_is_refused_with_the_reason_and_the_way_out(name: str) -> None:
    refused = REFUSED_ARGUMENTS[name]
    with pytest.raises(ValueError, match=f"{name}=.* cannot be used") as caught:
        MoSLoRAConfig(**{name: SET[name]})
    assert refused.reason in str(caught.value) and str(caught.value).endswith(refused.instead)
    late = MoSLoRAConfig(target_modules=ATTENTION)
    setattr(late, name, SET[name])
    with pytest.raises(ValueError, match=f"{name}=.* cannot be used"):
        get_peft_model(tiny.llama(), late)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("corda_config", "CordaConfig"),
        ("lora_ga_config", "LoraGAConfig"),
        ("runtime_config", "LoraRuntimeConfig"),
    ],
)
def test_a_sub_configuration_that_changes_nothing_in_lora_is_accepted_at_its_defaults(
    name: str, kind: str
) -> None:
    default = made(kind)
    for value in (None, {}, default, default and dataclasses.asdict(default)):
        assert name not in MoSLoRAConfig(**{name: value}).to_dict()


@pytest.mark.parametrize("start", REFUSED_STARTS)
def test_a_start_that_lora_alone_has_is_refused_with_the_reason(start: str) -> None:
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' cannot be used"):
        MoSLoRAConfig(init_lora_weights=start)


# ---- configurations in files ---------------------------------------------------------------------------------

STARTS = (
    {},
    {"mixer": "two-subspace"},
    *({"init_lora_weights": start} for start in ("pissa", "olora", "orthogonal")),
)


@pytest.mark.parametrize("own", STARTS, ids=str)
@torch.no_grad()
def test_a_configuration_that_was_saved_alone_starts_what_the_one_in_memory_starts(
    own: dict[str, object], tmp_path: Path
) -> None:
    fresh = MoSLoRAConfig(r=4, target_modules=ATTENTION, **own)
    fresh.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    by_hand = {"peft_type": "MOSLORA", "r": 4, "target_modules": ATTENTION, **own}
    states = []
    for config in (fresh, read, MoSLoRAConfig(**written), MoSLoRAConfig(**by_hand)):
        torch.manual_seed(1)
        model = get_peft_model(tiny.llama(), config)
        assert torch.isfinite(run(model)).all()
        states.append({n: p for n, p in model.named_parameters() if "moslora_" in n})
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[name], p) for name, p in states[0].items())
    # One that was used, and whose adapter was not saved, is as fresh as before.
    fresh.save_pretrained(tmp_path)
    assert not PeftConfig.from_pretrained(tmp_path).is_saved


def test_a_configuration_beside_its_adapters_values_leaves_the_start_to_them(tmp_path: Path) -> None:
    """Whoever saved it, and as 0.1 wrote it too; the one in memory may start another adapter."""
    config = MoSLoRAConfig(r=4, target_modules=ATTENTION, init_lora_weights="pissa")
    get_peft_model(tiny.llama(), config).save_pretrained(tmp_path / "peft")
    assert not dataclasses.replace(config).is_saved
    alone = tiny.llama()
    alone.add_adapter(MoSLoRAConfig(r=4, target_modules=ATTENTION, init_lora_weights="pissa"))
    alone.save_pretrained(tmp_path / "transformers")
    for name in ("peft", "transformers"):
        assert PeftConfig.from_pretrained(tmp_path / name).is_saved
        path = tmp_path / name / "adapter_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        del values["values_in_file"]
        path.write_text(json.dumps(values), encoding="utf-8")
        assert PeftConfig.from_pretrained(tmp_path / name).is_saved
        expected = run(alone) if name == "transformers" else run(tiny.llama())
        assert torch.equal(run(PeftModel.from_pretrained(tiny.llama(), tmp_path / name)), expected)


@torch.no_grad()
def test_ignore_mismatched_sizes_loads_what_fits_and_says_what_does_not(tmp_path: Path) -> None:
    """As in PEFT's LoRA: a tensor of another size stays as it was. Without the word nothing is loaded."""
    saved = laws.adapt(tiny.llama, target_modules=["lm_head", "q_proj"], seed=2)
    saved.save_pretrained(tmp_path, save_embedding_layers=False)
    longer = lambda: tiny.llama(vocab_size=80)  # noqa: E731
    for low_cpu_mem_usage in (False, True):
        fresh = laws.adapt(longer, target_modules=["lm_head", "q_proj"])
        before = {name: p.clone() for name, p in laws.factors_by_key(fresh).items()}
        with pytest.raises(ValueError, match=r"nothing was loaded.*\n.*lm_head.*\(64, 4\).*\(80, 4\)"):
            fresh.load_adapter(tmp_path, "default", low_cpu_mem_usage=low_cpu_mem_usage)
        assert all(torch.equal(p, before[name]) for name, p in laws.factors_by_key(fresh).items())
        with pytest.warns(UserWarning, match=r"lm_head.*found shape torch.Size\(\[64, 4\]\)"):
            fresh.load_adapter(
                tmp_path, "default", ignore_mismatched_sizes=True, low_cpu_mem_usage=low_cpu_mem_usage
            )
        loaded, values = laws.factors_by_key(fresh), laws.factors_by_key(saved)
        for name, p in loaded.items():
            stayed = "lm_head.moslora_B" in name
            assert torch.equal(p, before[name] if stayed else values[name])
        # Once is once: what is loaded afterwards is judged anew.
        fresh.load_state_dict(fresh.state_dict())
        with pytest.raises(ValueError, match="nothing was loaded"):
            fresh.load_adapter(tmp_path, "default")


def test_the_status_of_a_model_names_the_method() -> None:
    assert laws.adapt(tiny.llama, target_modules=ATTENTION).get_model_status().peft_types == {
        "default": "MOSLORA"
    }
