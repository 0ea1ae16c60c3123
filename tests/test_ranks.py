"""Other ranks: the nearest ΔW there is, by torch's own SVD of the dense matrix, and what it cost is stated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from typer.testing import CliRunner

import tiny
from moslora.adapters.arithmetic import FOLD_TOLERANCE
from moslora.adapters.factors import Adapter, Factors, Form
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.ranks import nearest, pad, to_rank
from moslora.cli import app
from test_tuner import adapted
from tolerances import MODEL, RELATIVE, SVD, relative_error

F64 = RELATIVE[torch.float64]


def draw(seed: int, r: int, form: Form = Form()) -> Factors:  # noqa: B008  frozen
    generator = torch.Generator().manual_seed(seed)
    A, M, B = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((r, 12), (r, r), (8, r)))
    if form.groups > 1:
        B = torch.block_diag(
            *(b.T for b in B.T.reshape(form.groups, r // form.groups, 8)[..., : 8 // form.groups])
        )
    return Factors(A, M, B, 0.7, form)


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 10))
def test_no_factors_of_that_rank_are_nearer(seed: int, r: int, wanted: int) -> None:
    f = draw(seed, r)
    near = nearest(f, wanted)
    assert near.r == wanted and near.is_folded and near.scale == 1
    lost = torch.linalg.svdvals(f.delta_weight())[wanted:].norm()  # Eckart and Young
    found = (near.delta_weight() - f.delta_weight()).norm()
    assert float(found) == pytest.approx(float(lost), rel=0, abs=SVD * f.norm())


@given(st.integers(0, 2**16), st.sampled_from([2, 4]), st.integers(1, 9))
def test_a_grouped_convolution_keeps_its_groups(seed: int, r: int, wanted: int) -> None:
    f = draw(seed, r, Form("conv", (3,), 2))
    near = nearest(f, wanted)
    assert near.form == f.form and near.r == max(1, wanted // 2) * 2
    half = near.r // 2
    assert not near.B[:4, half:].any() and not near.B[4:, :half].any()
    lost = [torch.linalg.svdvals(delta)[half:].norm() for delta in f.delta_weight().chunk(2)]
    found = (near.delta_weight() - f.delta_weight()).norm()
    assert float(found) == pytest.approx(float(torch.stack(lost).norm()), rel=0, abs=SVD * f.norm())


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(0, 4), st.booleans())
def test_filling_up_with_zeros_changes_no_delta_weight(seed: int, r: int, more: int, fold: bool) -> None:
    f = draw(seed, r).fold() if fold else draw(seed, r)
    wide = pad(f, r + more)
    assert wide.r == r + more and wide.is_folded == f.is_folded
    assert relative_error(wide.delta_weight(), f.delta_weight()) < F64


def test_the_cost_is_stated_by_module_and_over_all() -> None:
    a, b = draw(1, 6), draw(2, 2)
    done = to_rank(Adapter({"a": a, "b": b}), 2)
    assert done.errors["b"] < SVD < 0.1 < done.errors["a"]
    lost = (a.delta_weight() - done.adapter.modules["a"].delta_weight()).norm()
    whole = torch.stack([a.delta_weight().norm(), b.delta_weight().norm()]).norm()
    assert done.overall == pytest.approx(float(lost / whole), rel=1e-9)
    with pytest.raises(ValueError, match="at least 1; found 0"):
        nearest(a, 0)


def test_a_module_that_learned_nothing_costs_nothing() -> None:
    zero = Factors(torch.ones(4, 6), torch.eye(4), torch.zeros(5, 4), 1.0)
    done = to_rank(Adapter({"a": zero}), 2)
    assert done.overall == 0 and done.errors == {"a": 0.0}


def test_the_verb_writes_another_rank_that_stock_peft_runs(tmp_path: Path) -> None:
    adapted(rank_pattern={"v_proj": 2}).save_pretrained(tmp_path / "native")
    run = CliRunner().invoke
    for rank, to in ((2, "lora"), (8, "lora"), (8, "native")):
        out = tmp_path / f"{to}-{rank}"
        done = run(
            app, ["export", str(tmp_path / "native"), str(out), "--to", to, "--rank", str(rank), "--json"]
        )
        assert done.exit_code == 0, done.output
        proof = json.loads(done.stdout)
        assert proof["max_relative_error"] <= FOLD_TOLERANCE and proof["rank"] == rank
        assert (proof["rank_error"] > 0.01) == (rank == 2) and len(proof["rank_errors"]) == proof["modules"]
        assert {f.r for f in read_adapter(out).modules.values()} == {rank}
    with torch.no_grad():
        logits = [
            PeftModel.from_pretrained(tiny.llama(), tmp_path / name).eval()(tiny.tokens()).logits
            for name in ("native", "lora-8", "native-8", "lora-2")
        ]
    assert relative_error(logits[1], logits[0]) < MODEL and relative_error(logits[2], logits[0]) < MODEL
    assert relative_error(logits[3], logits[0]) > 100 * MODEL
    done = run(app, ["export", str(tmp_path / "native"), str(tmp_path / "x"), "--rank", "0"])
    assert done.exit_code == 2 and "at least 1" in done.output and not (tmp_path / "x").exists()


def test_a_sum_at_a_rank_says_what_that_cost(tmp_path: Path) -> None:
    for seed in (0, 1):
        adapted(seed=seed).save_pretrained(tmp_path / str(seed))
    arguments = ["combine", str(tmp_path / "0"), str(tmp_path / "1"), "--out"]
    for name, more in (("exact", []), ("small", ["--rank", "4"])):
        done = CliRunner().invoke(app, [*arguments, str(tmp_path / name), *more, "--json"])
        assert done.exit_code == 0, done.output
        proof = json.loads(done.stdout)
        assert proof["rank"] == (4 if more else 8) and proof["reader"].startswith("peft ")
        assert (proof["rank_error"] is None) == (not more)
