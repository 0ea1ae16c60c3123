"""What inspect says of an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Factors
from moslora.adapters.formats.native import START, keep_start
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.inspection import effective_rank, inspect_adapter
from moslora.cli import app
from moslora.errors import AdapterError, ModelError
from moslora.reports.inspection import write_page
from tolerances import MODEL


def save_adapter(folder: Path, mixer: str = "kaiming") -> Path:
    torch.manual_seed(5)
    config = MoSLoRAConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, mixer=mixer
    )
    get_peft_model(tiny.llama(), config).save_pretrained(folder)
    return folder


def change(folder: Path, part: str, factor: float) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({n: t * factor if part in n else t for n, t in load_file(file).items()}, file)


def test_every_figure_is_that_of_the_delta_weight(tmp_path: Path) -> None:
    adapter = read_adapter(save_adapter(tmp_path / "a"))
    tiny.llama().save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    found = inspect_adapter(tmp_path / "a", str(tmp_path / "base"))
    assert [r.module for r in found.modules] == sorted(adapter.modules) and found.mixer == "kaiming"
    for report in found.modules:
        factors = adapter.modules[report.module]
        delta = factors.delta_weight()
        assert report.norm == pytest.approx(float(delta.norm()), rel=MODEL)
        assert report.relative_norm == pytest.approx(
            float(delta.norm() / weights[f"{report.module}.weight"].double().norm()), rel=MODEL
        )
        values = torch.linalg.svdvals(delta)[:4]
        shares = values / values.sum()
        assert report.effective_rank == pytest.approx(
            float((-(shares * shares.log()).sum()).exp()), rel=MODEL
        )
        M, eye = factors.M.double(), torch.eye(4, dtype=torch.float64)
        assert report.from_identity == pytest.approx(float((M - eye).norm() / eye.norm()), rel=MODEL)
        U, _, Vh = torch.linalg.svd(M)
        assert report.from_orthogonal == pytest.approx(float((M - U @ Vh).norm() / eye.norm()), rel=MODEL)
        A = factors.A.double()
        assert report.mixed_scale == pytest.approx(float((M @ A).norm() / A.norm()), rel=MODEL)
        assert report.moved is None


def test_the_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.ones(5).double()) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0]).double()) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_singular_values_are_those_of_the_delta_weight() -> None:
    torch.manual_seed(0)
    wide = Factors(torch.randn(6, 9), torch.randn(6, 6), torch.randn(4, 6), 0.5)
    expected = torch.linalg.svdvals(wide.delta_weight())
    torch.testing.assert_close(wide.singular_values(), expected)


def test_how_far_a_mixer_moved_is_told_from_the_start_that_was_kept_and_from_nothing_else(
    tmp_path: Path,
) -> None:
    folder = save_adapter(tmp_path / "a", "identity")
    # The name of the mixer says nothing: an adapter that was imported or combined has the same.
    assert {r.moved for r in inspect_adapter(folder).modules} == {None}
    adapter = read_adapter(folder)
    keep_start(folder, {name: 2 * factors.M for name, factors in adapter.modules.items()})
    found = inspect_adapter(folder)
    assert all(r.moved == pytest.approx(0.5) for r in found.modules) and found.groups[0].moved is not None
    change(folder, "moslora_M", 1.5)  # other tensors, so another adapter: trained further, or saved over it
    assert {r.moved for r in inspect_adapter(folder).modules} == {None}
    export_adapter(folder, tmp_path / "lora")
    assert inspect_adapter(tmp_path / "lora").mixer is None


def test_stock_loaders_pass_over_the_start_that_is_kept(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a")
    ids = tiny.tokens()
    before = PeftModel.from_pretrained(tiny.llama(), folder)(ids).logits
    keep_start(folder, {name: f.M for name, f in read_adapter(folder).modules.items()})
    assert torch.equal(PeftModel.from_pretrained(tiny.llama(), folder)(ids).logits, before)


def test_a_damaged_start_is_named(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a")
    (folder / START).write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="damaged or cut off"):
        inspect_adapter(folder)


def test_modules_that_learned_nothing_are_named(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a")
    change(tmp_path / "a", "layers.0.self_attn.q_proj.moslora_B", 1e-6)
    found = inspect_adapter(tmp_path / "a")
    assert found.learned_nothing == ("model.layers.0.self_attn.q_proj",)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "a")], env={"COLUMNS": "80"})
    assert shown.exit_code == 0 and "Learned nothing: 1 of 4" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 160


def test_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a")
    tiny.gpt2().save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="has no weight of any module"):
        inspect_adapter(tmp_path / "a", str(tmp_path / "base"))


def test_the_page_needs_nothing_from_outside_and_has_every_module(tmp_path: Path) -> None:
    found = inspect_adapter(save_adapter(tmp_path / "a"))
    write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(report.module in page for report in found.modules)
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count("<i style=") == 2 * 4
    with pytest.raises(FileExistsError):
        write_page(found, tmp_path / "page.html")


def test_json_has_every_figure(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "a"), "--json"])
    found = json.loads(shown.output)
    assert len(found["modules"]) == 4 and len(found["modules"][0]["mixer_values"]) == 4


def test_layers_are_in_their_order(tmp_path: Path) -> None:
    from moslora.adapters.inspection import natural

    assert sorted(["a.10.q", "a.9.q", "a.9.k"], key=natural) == ["a.9.k", "a.9.q", "a.10.q"]
