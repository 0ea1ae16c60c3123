"""Weighted sums of adapters on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.arithmetic import add
from moslora.adapters.combine import combine
from moslora.adapters.export import PROOF_FILE
from moslora.adapters.factors import Adapter, Factors, Form
from moslora.adapters.formats import lora
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.formats.table import FORMATS
from moslora.cli import app
from moslora.errors import AdapterError, ProofError
from tolerances import MODEL, RELATIVE, relative_error


def save(folder: Path, seed: int, **changes: Any) -> Path:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(seed)
    get_peft_model(tiny.llama(), MoSLoRAConfig(**{**settings, **changes})).save_pretrained(folder)
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    other = {"r": 2, "use_rslora": True, "target_modules": ["v_proj", "up_proj"], "mixer": "orthogonal"}
    return save(tmp_path / "one", 1), save(tmp_path / "two", 2, **other)


@torch.no_grad()
def test_the_sum_runs_in_stock_peft_as_both_adapters_together(two: tuple[Path, Path], tmp_path: Path) -> None:
    proof = combine(two, [1.0, -0.5], tmp_path / "sum")
    assert proof.rank == 6 and proof.modules == 6
    ids = tiny.tokens()
    model = tiny.llama()
    for folder, weight in zip(two, (1.0, -0.5), strict=True):
        for name in read_adapter(folder).modules:
            delta = weight * read_adapter(folder).delta_weight(name)
            model.get_submodule(name).weight += delta.float()
    found = PeftModel.from_pretrained(tiny.llama(), tmp_path / "sum")
    assert found.peft_config["default"].peft_type == "LORA"
    assert relative_error(found(ids).logits, model(ids).logits) < MODEL


@pytest.mark.parametrize("to", ["lora", "native"])
def test_one_adapter_at_weight_one_comes_back_as_it_is(
    two: tuple[Path, Path], tmp_path: Path, to: str
) -> None:
    combine(two[:1], [1.0], tmp_path / "same", to)
    before, after = read_adapter(two[0]), read_adapter(tmp_path / "same")
    for name in before.modules:
        size = before.delta_weight(name)
        assert relative_error(after.delta_weight(name), size) < RELATIVE[torch.float32]


@given(
    st.integers(0, 2**16), st.lists(st.floats(-3, 3).filter(lambda w: abs(w) > 0.01), min_size=1, max_size=3)
)
def test_delta_weights_add_up_for_any_kind(seed: int, weights: list[float]) -> None:
    torch.manual_seed(seed)
    form = Form("conv", (3,))
    adapters = [
        Adapter({"m": Factors(torch.randn(r, 12), torch.randn(r, r), torch.randn(5, r), 0.5, form)})
        for r in range(1, len(weights) + 1)
    ]
    whole = add(adapters, weights)
    expected = sum(w * a.delta_weight("m") for w, a in zip(weights, adapters, strict=True))
    size = sum(abs(w) * a.delta_weight("m").abs() for w, a in zip(weights, adapters, strict=True))
    assert isinstance(expected, torch.Tensor) and isinstance(size, torch.Tensor)
    assert relative_error(whole.delta_weight("m"), expected, size) < RELATIVE[torch.float32]
    assert whole.modules["m"].form == form


def test_a_careless_writer_fails_the_proof_and_leaves_nothing(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(adapter: Adapter, folder: Path) -> None:
        doubled = {n: dataclasses.replace(f, B=2 * f.B) for n, f in adapter.modules.items()}
        lora.write(dataclasses.replace(adapter, modules=doubled), folder)

    monkeypatch.setitem(FORMATS, "lora", dataclasses.replace(FORMATS["lora"], write=careless))
    with pytest.raises(ProofError, match="differs from the sum"):
        combine(two, [1.0, 1.0], tmp_path / "sum")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_what_cannot_be_added_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    for weights, message in (
        ([1.0], "a weight for each"),
        ([1.0, 0.0], "not 0"),
        ([1.0, float("inf")], "finite"),
    ):
        with pytest.raises(AdapterError, match=message):
            combine(two, weights, tmp_path / "sum")
    with pytest.raises(ValueError, match="choose one of diffusers, gguf, kohya, lora, native"):
        combine(two, [1.0, 1.0], tmp_path / "sum", "paddle")
    config = json.loads((two[1] / "adapter_config.json").read_text())
    for folder, base in zip(two, ("a", "b"), strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    with pytest.raises(AdapterError, match="different bases"):
        combine(two, [1.0, 1.0], tmp_path / "sum")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_adapters_of_other_shapes_or_with_more_than_factors_are_refused(tmp_path: Path) -> None:
    def draw(columns: int) -> Adapter:
        return Adapter({"m": Factors(torch.randn(2, columns), torch.eye(2), torch.randn(3, 2), 1.0)})

    with pytest.raises(AdapterError, match="m differs between"):
        add([draw(4), draw(5)], [1.0, 1.0])
    more = dataclasses.replace(draw(4), extra={"head.weight": torch.ones(1)})
    with pytest.raises(AdapterError, match="also holds head"):
        add([draw(4), more], [1.0, 1.0])


def test_the_verb_says_what_it_proved(two: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["combine", *map(str, two), "--weights", "1,0.5", "--out", str(tmp_path / "sum")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "rank up to 6" in shown.output and "Proven" in shown.output
    assert json.loads((tmp_path / "sum" / PROOF_FILE).read_text())["weights"] == [1.0, 0.5]
    wrong = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "other"), "--weights", "1,x"])
    assert wrong.exit_code == 2 and "not a list of numbers" in wrong.output
