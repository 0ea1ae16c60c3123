"""Formats: other kinds of layers than linear ones, and other programs' files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from moslora import MoSLoRAConfig
from moslora.adapters.arithmetic import FOLD_TOLERANCE, distance
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Adapter, Factors, Form
from moslora.adapters.formats import native
from moslora.adapters.formats.directory import CONFIG, WEIGHTS
from moslora.adapters.formats.layout import as_matrices, as_stored
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.adapters.formats.table import FORMATS, WRITTEN
from moslora.cli import app
from moslora.errors import AdapterError
from tolerances import MODEL, relative_error


class World(nn.Module):
    """One of each: an embedding, convolutions with and without groups, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.mix = nn.Conv1d(6, 8, 3, padding=1)
        self.apart = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.look = nn.Conv2d(1, 4, (2, 3), stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.apart(self.mix(self.words(ids).transpose(1, 2)))
        picture = self.look(h.unsqueeze(1))  # (n, 4, *positions)
        return self.head(h.transpose(1, 2)) + picture.mean()


def world(seed: int = 0) -> World:
    torch.manual_seed(seed)
    return World().eval()


TARGETS = ["words", "mix", "apart", "look", "head"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A native adapter on every kind of layer, all factors random."""
    model = get_peft_model(world(), MoSLoRAConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moslora_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "native", save_embedding_layers=False)
    return tmp_path / "native"


@torch.no_grad()
def test_every_kind_of_layer_folds_into_what_stock_peft_runs_alike(saved: Path, tmp_path: Path) -> None:
    proof = export_adapter(saved, tmp_path / "lora")
    assert proof.modules == len(TARGETS) and proof.max_relative_error <= FOLD_TOLERANCE
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    ids = torch.arange(18).view(2, 9)
    ours = PeftModel.from_pretrained(world(), saved).eval()(ids)
    with pytest.warns(UserWarning, match="groups > 1. Merging is not supported"):
        theirs = PeftModel.from_pretrained(world(), tmp_path / "lora").eval()(ids)
    assert relative_error(theirs, ours) < MODEL
    assert relative_error(world()(ids), ours) > 100 * MODEL


def test_the_files_hold_every_kind_in_the_layout_of_peft(saved: Path, tmp_path: Path) -> None:
    export_adapter(saved, tmp_path / "lora")
    shapes = {
        name.removeprefix("base_model.model."): tuple(tensor.shape)
        for name, tensor in load_file(tmp_path / "lora" / WEIGHTS).items()
    }
    assert shapes == {
        "words.lora_embedding_A": (4, 20),
        "words.lora_embedding_B": (6, 4),
        "mix.lora_A.weight": (4, 6, 3),
        "mix.lora_B.weight": (8, 4, 1),
        "apart.lora_A.weight": (4, 8, 3),
        "apart.lora_B.weight": (8, 2, 1),
        "look.lora_A.weight": (4, 1, 2, 3),
        "look.lora_B.weight": (4, 4, 1, 1),
        "head.lora_A.weight": (4, 8),
        "head.lora_B.weight": (5, 4),
    }


def test_native_to_lora_to_native_to_lora_keeps_every_kind(saved: Path, tmp_path: Path) -> None:
    export_adapter(saved, tmp_path / "lora")
    export_adapter(tmp_path / "lora", tmp_path / "lifted", to="native")
    export_adapter(tmp_path / "lifted", tmp_path / "again")
    assert (
        distance(read_adapter(saved), read_adapter(tmp_path / "again")).max_relative_error <= FOLD_TOLERANCE
    )
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "lora" / WEIGHTS).read_bytes()


@given(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 3))
def test_laying_a_convolution_as_matrices_and_back_changes_no_bit(
    groups: int, kernel: list[int], width: int
) -> None:
    r, ones = groups * width, (1,) * len(kernel)
    stored = {
        "A": torch.randn(r, 5, *kernel),
        "M": torch.randn(r, r, *ones),
        "B": torch.randn(2 * groups, width, *ones),
    }
    flat, form = as_matrices(stored, is_embedding=False)
    assert form == Form("conv", tuple(kernel), groups)
    back = as_stored(Factors(flat["A"], flat["M"], flat["B"], 1.0, form))
    assert all(torch.equal(back[name], stored[name]) for name in stored)


def test_a_changed_form_fails_the_comparison() -> None:
    A, M, B = torch.randn(2, 12), torch.eye(2), torch.randn(3, 2)
    one = Adapter({"m": Factors(A, M, B, 1.0, Form("conv", (2, 2)))})
    with pytest.raises(AdapterError, match="changed its form"):
        distance(one, Adapter({"m": Factors(A, M, B, 1.0, Form("conv", (4,)))}))


# ---- other programs' files


def foreign(folder: Path, mixer: str, pickled: bool = False, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a directory as the authors' forks do; return its factors."""
    torch.manual_seed(1)
    factors = {"lora_A": torch.randn(3, 8), mixer: torch.randn(3, 3), "lora_B": torch.randn(5, 3)}
    tensors = {f"base_model.model.head.{part}.weight": tensor for part, tensor in factors.items()}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["head"], "bias": "none"}
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / WEIGHTS)
    return factors


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("mixer", ["lora_AB", "lora_mixer"])
def test_checkpoints_of_the_authors_keep_their_mixers(tmp_path: Path, mixer: str, pickled: bool) -> None:
    factors = foreign(tmp_path / "theirs", mixer, pickled)
    result = CliRunner().invoke(app, ["import", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    assert "stock PEFT would drop them" in result.output
    ids = torch.arange(18).view(2, 9)
    base, adapted = world(), PeftModel.from_pretrained(world(), tmp_path / "ours")
    seen: list[torch.Tensor] = []
    base.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain = base(ids)
    chain = seen[0] @ factors["lora_A"].T @ factors[mixer].T @ factors["lora_B"].T
    assert relative_error(adapted(ids), plain + 2 * chain) < MODEL


def test_a_pickle_that_is_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    foreign(tmp_path / "theirs", "lora_AB")
    (tmp_path / "theirs" / WEIGHTS).unlink()
    torch.save({"base_model.model.head.lora_AB.weight": Trap()}, tmp_path / "theirs" / "adapter_model.bin")
    result = CliRunner().invoke(app, ["import", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert result.exit_code == 2 and "Error:" in result.output
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


def test_a_missing_mixer_among_others_is_named(tmp_path: Path) -> None:
    foreign(tmp_path / "theirs", "lora_AB")
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    tensors["base_model.model.other.lora_A.weight"] = torch.randn(3, 8)
    tensors["base_model.model.other.lora_B.weight"] = torch.randn(5, 3)
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(AdapterError, match="other has no mixer while"):
        read_adapter(tmp_path / "theirs")


def test_modules_that_the_authors_configuration_leaves_without_a_mixer_are_plain_lora(tmp_path: Path) -> None:
    # As their fork looks a module up: by the keys of the other patterns, else by its whole path.
    config = {
        "lora_use_mixer": True,
        "lora_use_mixer_pattern": {"other": False, "plain": False, "with": True},
        "rank_pattern": {"plain": 2},
        "target_modules": ["head", "other", "plain", "with", "conv", "embed"],
    }
    foreign(tmp_path / "theirs", "lora_AB", **config)
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    for name, shape in (("other", (3, 8)), ("a.plain", (2, 8)), ("conv", (3, 8, 3, 3))):
        ones = (1,) * (len(shape) - 2)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(*shape)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(5, shape[0], *ones)
    tensors["base_model.model.embed.lora_embedding_A"] = torch.randn(3, 20)
    tensors["base_model.model.embed.lora_embedding_B"] = torch.randn(8, 3)
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    found = read_adapter(tmp_path / "theirs").modules
    assert {name: factors.is_folded for name, factors in found.items()} == {
        "head": False,
        "other": True,
        "a.plain": True,
        "conv": True,
        "embed": True,
    }
    tensors["base_model.model.with.lora_A.weight"] = torch.randn(3, 8)
    tensors["base_model.model.with.lora_B.weight"] = torch.randn(5, 3)
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(AdapterError, match="with has no mixer while other linear layers"):
        read_adapter(tmp_path / "theirs")


@pytest.mark.parametrize("mixed", [True, False])
def test_paddles_transposed_layout_gives_the_same_delta_weight(tmp_path: Path, mixed: bool) -> None:
    torch.manual_seed(2)
    A, M, B = torch.randn(8, 3), torch.randn(3, 3), torch.randn(3, 5)
    path = "llama.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_A": A, f"{path}.lora_B": B, **({f"{path}.lora_AB": M} if mixed else {})}
    save_file(tensors, tmp_path / "peft_model.safetensors")
    config = {"r": 3, "lora_alpha": 6, "lora_use_mixer": mixed}
    (tmp_path / "lora_config.json").write_text(json.dumps(config))
    assert detect(tmp_path) == "paddle"
    found = read_adapter(tmp_path)
    expected = 2 * (A @ M @ B if mixed else A @ B).T.double()  # Paddle's weight is (in, out)
    assert relative_error(found.delta_weight("model.layers.0.self_attn.q_proj"), expected) < MODEL
    (tmp_path / "out").mkdir()
    native.write(found, tmp_path / "out")
    assert distance(found, read_adapter(tmp_path / "out")).max_relative_error <= FOLD_TOLERANCE


def test_paddle_without_safetensors_or_without_its_mixer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lora_config.json").write_text(json.dumps({"r": 3, "lora_use_mixer": True}))
    (tmp_path / "lora_model_state.pdparams").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match="which are not opened"):
        read_adapter(tmp_path)
    tensors = {"a.lora_A": torch.randn(8, 3), "a.lora_B": torch.randn(3, 5)}
    save_file(tensors, tmp_path / "peft_model.safetensors")
    with pytest.raises(AdapterError, match="lacks its mixer"):
        read_adapter(tmp_path)


def test_formats_that_are_only_read_are_not_offered_for_writing(saved: Path, tmp_path: Path) -> None:
    assert (
        set(WRITTEN)
        == {name for name, f in FORMATS.items() if f.write}
        == {*("lora", "native", "gguf", "diffusers", "kohya", "original")}
    )
    with pytest.raises(
        ValueError, match="only read; choose one of diffusers, gguf, kohya, lora, native, original"
    ):
        export_adapter(saved, tmp_path / "out", to="official")
    assert not (tmp_path / "out").exists()
