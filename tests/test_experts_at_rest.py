"""Experts on disk: folded, summed and brought to other ranks one by one, and laid together as PEFT reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

import laws
from moslora import MoSLoRAConfig
from moslora.adapters.arithmetic import FOLD_TOLERANCE, distance
from moslora.adapters.combine import combine
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import experts
from moslora.adapters.formats.reading import read_adapter
from moslora.errors import AdapterError
from test_tuner_experts import BOTH, MODELS, build, run
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")


def saved(folder: Path, kind: str = "mixtral", seed: int = 1, **settings: Any) -> Any:
    values = {"target_modules": ["q_proj"], "target_parameters": BOTH, "r": 3, **settings}
    model = laws.adapt(lambda: build(kind), MoSLoRAConfig, seed, **values)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_stock_peft_runs_the_fold_of_experts_as_they_ran(kind: str, tmp_path: Path) -> None:
    expected = run(saved(tmp_path / "native", kind, use_rslora=True))
    proof = export_adapter(tmp_path / "native", tmp_path / "lora")
    assert proof.max_relative_error <= FOLD_TOLERANCE and proof.reader.startswith("peft ")
    assert proof.modules == 2 * (1 + 2 * 4)  # per layer: q_proj, and two parameters of four experts
    found = run(PeftModel.from_pretrained(build(kind), tmp_path / "lora").eval())
    assert relative_error(found, expected) < MODEL
    assert relative_error(run(build(kind)), expected) > 100 * MODEL
    export_adapter(tmp_path / "lora", tmp_path / "lifted", "native")
    assert (
        relative_error(run(PeftModel.from_pretrained(build(kind), tmp_path / "lifted").eval()), expected)
        < MODEL
    )


def test_what_lies_in_the_file_is_delta_weight_by_expert(tmp_path: Path) -> None:
    model = saved(tmp_path / "native")
    adapter = read_adapter(tmp_path / "native")
    layer = model.base_model.model.model.layers[1].mlp.experts
    # One layer around the other, in the order in which the module has its parameters.
    for level, path in ((layer, "experts"), (layer.base_layer, "experts.base_layer")):
        delta = level.get_delta_weight("default").double()  # (E, out, in)
        for e in range(4):
            found = adapter.delta_weight(f"model.layers.1.mlp.{path}[{e}]")
            assert relative_error(found, delta[e]) < MODEL


@torch.no_grad()
def test_a_sum_of_experts_runs_in_stock_peft_as_both_together(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", seed=2)
    proof = combine([tmp_path / "one", tmp_path / "two"], [1.0, -0.5], tmp_path / "sum")
    assert proof.rank == 6 and proof.max_relative_error <= FOLD_TOLERANCE
    judge = build("mixtral")
    for model, weight in ((one, 1.0), (two, -0.5)):
        layers = dict(model.named_modules())
        for name, parameter in judge.named_parameters():
            module, _, leaf = name.rpartition(".")
            wrapper = layers.get(f"base_model.model.{module}")
            while hasattr(wrapper, "get_delta_weight"):
                if getattr(wrapper, "parameter_name", "weight") == leaf:
                    parameter += weight * wrapper.get_delta_weight("default")
                wrapper = wrapper.base_layer
    found = run(PeftModel.from_pretrained(build("mixtral"), tmp_path / "sum").eval())
    assert relative_error(found, run(judge)) < MODEL


def test_another_rank_is_taken_of_each_expert(tmp_path: Path) -> None:
    saved(tmp_path / "native")
    for rank in (2, 5):
        proof = export_adapter(tmp_path / "native", tmp_path / str(rank), rank=rank)
        assert (proof.rank_error > 0.01) == (rank == 2) and proof.rank_error is not None
        shapes = {
            k: tuple(t.shape)
            for k, t in load_file(tmp_path / str(rank) / "adapter_model.safetensors").items()
        }
        assert shapes["base_model.model.model.layers.0.mlp.experts.lora_A.weight"] == (4 * rank, 16)


@given(st.integers(0, 2**16), st.integers(1, 3), st.integers(2, 4))
def test_laying_experts_together_and_apart_changes_no_bit(seed: int, r: int, number: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = {
        name: torch.randn(*shape, generator=generator)
        for name, shape in (("A", (number * r, 5)), ("M", (number * r, r)), ("B", (6, r * number)))
    }
    apart = experts.separate("m", stored, number)
    modules = {
        path: Factors(own["A"], own["M"], own["B"], 0.5, experts.EXPERT) for path, own in apart.items()
    }
    back = experts.gather(modules)["m"]
    assert all(torch.equal(back[name], stored[name]) for name in stored)
    if number > 1:
        with pytest.raises(AdapterError, match="experts are missing"):
            experts.gather({path: f for path, f in modules.items() if path != "m[0]"})


def test_parameters_of_different_ranks_that_a_file_cannot_tell_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "native")
    config = json.loads((tmp_path / "native" / "adapter_config.json").read_text())
    for change, message in (
        ({"alpha_pattern": {"gate_up_proj": 1}}, "different alphas"),
        ({"r": 5}, "the configuration says rank 5, its tensors have rank 3"),
    ):
        (tmp_path / "native" / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(AdapterError, match=message):
            read_adapter(tmp_path / "native")


def test_experts_whose_parameters_are_not_named_are_not_written(tmp_path: Path) -> None:
    saved(tmp_path / "native")
    adapter = read_adapter(tmp_path / "native")
    from moslora.adapters.formats.table import FORMATS

    lost = Adapter(adapter.modules, {k: v for k, v in adapter.config.items() if k != "target_parameters"})
    for to in ("lora", "native"):
        format_ = FORMATS[to]
        assert format_.write is not None
        (tmp_path / to).mkdir(exist_ok=True)
        with pytest.raises(AdapterError, match="no target_parameters"):
            format_.write(lost, tmp_path / to)
    assert distance(adapter, adapter).modules == 18
