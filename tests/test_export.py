from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import moslora.adapters.export
import tiny
from moslora.adapters.arithmetic import FOLD_TOLERANCE, distance
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import lora, native
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.adapters.formats.table import FORMATS
from moslora.errors import AdapterError, ProofError
from test_tuner import adapted, config, train
from tolerances import MODEL, RELATIVE, relative_error


def draw(seed: int = 0, r: int = 4, dtype: torch.dtype = torch.float32, scale: float = 1.5) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A, M, B = (torch.randn(*s, generator=generator).to(dtype) for s in ((r, 12), (r, r), (9, r)))
    return Factors(A, M, B, scale)


def adapter(**changes: object) -> Adapter:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q", "v"], "mixer": "kaiming"}
    return Adapter({"layers.0.q": draw(0), "layers.0.v": draw(1)}, {**settings, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapted().save_pretrained(tmp_path / "native")
    return tmp_path / "native"


# ---- the adapter at rest


@given(st.integers(0, 2**16), st.integers(1, 6), st.sampled_from([torch.float32, torch.float64]))
def test_folding_and_unscaling_keep_the_delta_weight(seed: int, r: int, dtype: torch.dtype) -> None:
    before = draw(seed, r, dtype)
    after = before.fold().unscaled()
    assert after.is_folded and after.scale == 1
    size = before.scale * before.B.abs().double() @ before.M.abs().double() @ before.A.abs().double()
    assert relative_error(after.delta_weight(), before.delta_weight(), size) < RELATIVE[dtype]


def test_folding_twice_changes_no_bit() -> None:
    once = draw().fold()
    assert torch.equal(once.fold().A, once.A)


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 6))
def test_comparing_factors_is_comparing_delta_weights(seed: int, r1: int, r2: int) -> None:
    one, two = draw(seed, r1), draw(seed + 1, r2)
    expected = (one.delta_weight() - two.delta_weight()).norm() / one.delta_weight().norm()
    found = distance(Adapter({"m": one}), Adapter({"m": two})).max_relative_error
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_comparing_sees_a_dropped_mixer_a_wrong_scale_and_a_swapped_module() -> None:
    whole = adapter()
    for wrong in (
        {n: Factors(f.A, torch.eye(f.r), f.B, f.scale) for n, f in whole.modules.items()},
        {n: Factors(f.A, f.M, f.B, 2 * f.scale) for n, f in whole.modules.items()},
        {"layers.0.q": whole.modules["layers.0.v"], "layers.0.v": whole.modules["layers.0.q"]},
    ):
        assert distance(whole, Adapter(wrong)).max_relative_error > 0.5
    zero = Factors(torch.zeros(4, 12), torch.eye(4), torch.ones(9, 4), 1.0)
    assert distance(Adapter({"m": zero}), Adapter({"m": zero})).max_relative_error == 0
    assert distance(Adapter({"m": zero}), Adapter({"m": draw()})).max_relative_error == float("inf")
    broken = Factors(torch.full((4, 12), float("nan")), torch.eye(4), torch.ones(9, 4), 1.0)
    one, two = draw(), draw()  # a sound module after a broken one does not hide it
    found = distance(Adapter({"m": one, "n": two}), Adapter({"m": broken, "n": two}))
    assert not found.max_relative_error <= FOLD_TOLERANCE and found.worst_module == "m"
    with pytest.raises(AdapterError, match=r"Lost: \['layers.0.v'\]"):
        distance(whole, Adapter({"layers.0.q": draw()}))
    with pytest.raises(AdapterError, match="no modules"):
        distance(Adapter({}), Adapter({}))


# ---- formats


@pytest.mark.parametrize("format_", [native, lora])
@given(st.integers(0, 2**16), st.booleans(), st.booleans())
def test_reading_what_was_written_gives_the_adapter(tmp_path_factory, format_, seed, rslora, extra) -> None:  # type: ignore[no-untyped-def]
    patterns = {"rank_pattern": {"v": 2}, "alpha_pattern": {"layers.0.q": 5}, "use_rslora": rslora}
    scales = (5 / 2, 6 / 2**0.5) if rslora else (5 / 4, 6 / 2)
    modules = {"layers.0.q": draw(seed, 4, scale=scales[0]), "layers.0.v": draw(seed + 1, 2, scale=scales[1])}
    before = Adapter(
        modules, adapter(**patterns).config, {"base_model.model.head.weight": torch.ones(2)} if extra else {}
    )
    folder = tmp_path_factory.mktemp("adapter")
    format_.write(before, folder)
    after = format_.read(folder)
    assert distance(before, after).max_relative_error <= FOLD_TOLERANCE
    assert after.extra.keys() == before.extra.keys()
    if format_ is native:
        for name, factors in modules.items():
            found = after.modules[name]
            assert found.scale == factors.scale and found.form == factors.form
            assert all(torch.equal(getattr(found, part), getattr(factors, part)) for part in "AMB")
    else:
        assert after.is_folded and all(f.scale == 1 for f in after.modules.values())


@pytest.mark.parametrize("format_", [native, lora])
def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path, format_) -> None:  # type: ignore[no-untyped-def]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        format_.write(adapter(), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_lora_file_has_the_names_shapes_and_metadata_of_peft(tmp_path: Path) -> None:
    lora.write(adapter(), tmp_path)
    get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    ours, theirs = (
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "peft")
    )
    assert ours.keys() == theirs.keys()
    assert {k: tuple(v.shape) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        "base_model.model.layers.0.q.lora_A.weight": (4, 12),
        "base_model.model.layers.0.q.lora_B.weight": (9, 4),
        "base_model.model.layers.0.v.lora_A.weight": (4, 12),
        "base_model.model.layers.0.v.lora_B.weight": (9, 4),
    }
    header = (tmp_path / "adapter_model.safetensors").read_bytes()[8:200].decode(errors="replace")
    assert '"__metadata__":{"format":"pt"}' in header


def test_half_precision_factors_are_folded_in_float32(tmp_path: Path) -> None:
    half = Adapter(
        {n: draw(i, dtype=torch.bfloat16) for i, n in enumerate(adapter().modules)}, adapter().config
    )
    lora.write(half, tmp_path)
    after = lora.read(tmp_path)
    assert after.modules["layers.0.q"].A.dtype == torch.float32
    assert distance(half, after).max_relative_error <= FOLD_TOLERANCE


# ---- the verb


CHANGES: list[dict[str, object]] = [
    {},
    {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.*q_proj": 3}, "use_rslora": True},
    {"target_modules": "all-linear"},
    {"modules_to_save": ["lm_head"]},
    {"layers_to_transform": [1]},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_stock_peft_runs_the_export_to_the_same_logits(tmp_path: Path, changes: dict[str, object]) -> None:
    model = adapted(**changes).train()
    train(model)
    model.save_pretrained(tmp_path / "native")
    proof = export_adapter(tmp_path / "native", tmp_path / "lora")
    assert proof.max_relative_error <= FOLD_TOLERANCE
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    assert type(loaded.peft_config["default"]) is LoraConfig
    with torch.no_grad():
        expected, base = model.eval()(tiny.tokens()).logits, tiny.llama()(tiny.tokens()).logits
        assert relative_error(loaded(tiny.tokens()).logits, expected) < MODEL
        assert relative_error(base, expected) > 100 * MODEL


def test_gpt2_exports_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny.gpt2(), config(target_modules=["c_attn", "c_proj"])).eval()
    model.save_pretrained(tmp_path / "native")
    export_adapter(tmp_path / "native", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "lora")
    with torch.no_grad():
        assert relative_error(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits) < MODEL


def test_a_plain_lora_becomes_native_and_goes_on_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.eval().save_pretrained(tmp_path / "lora")
    export_adapter(tmp_path / "lora", tmp_path / "native", to="native")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "native", is_trainable=True)
    with torch.no_grad():
        assert relative_error(loaded.eval()(tiny.tokens()).logits, model(tiny.tokens()).logits) < MODEL
    assert any("moslora_M" in n for n, p in loaded.named_parameters() if p.requires_grad)


def test_the_proof_is_kept_beside_the_adapter(saved: Path, tmp_path: Path) -> None:
    proof = export_adapter(saved, tmp_path / "lora")
    kept = json.loads((tmp_path / "lora" / "moslora_proof.json").read_text())
    assert kept["max_relative_error"] == proof.max_relative_error and kept["modules"] == 4


def test_a_failed_proof_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Factors, "fold", lambda self: Factors(self.A, torch.eye(self.r), self.B, self.scale))
    with pytest.raises(ProofError, match=r"relative error of .* above 1e-06. Nothing was left"):
        export_adapter(saved, tmp_path / "lora")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native"]


def test_a_nan_in_the_proof_is_a_failure(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = moslora.adapters.export.distance
    monkeypatch.setattr(
        moslora.adapters.export, "distance", lambda a, b: type(nan(a, b))(float("nan"), "layers.0.q", 1)
    )
    with pytest.raises(ProofError):
        export_adapter(saved, tmp_path / "lora")


def test_an_existing_place_is_never_overwritten(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export_adapter(saved, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    export_adapter(saved, tmp_path / "new" / "deep")
    assert read_adapter(tmp_path / "new" / "deep").is_folded


KEY = "base_model.model.model.layers.0.self_attn.q_proj."


def rewrite(change):  # type: ignore[no-untyped-def]
    """Make a breakage that edits the tensors of a directory."""

    def breakage(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return breakage


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def configured(text: str):  # type: ignore[no-untyped-def]
    return lambda folder: (folder / "adapter_config.json").write_text(text)


BREAKAGES = {
    "cut off": (cut, "damaged or cut off"),
    "empty file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "damaged or cut off"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        r"has no adapter_model\.safetensors",
    ),
    "pickle": (pickle, "pickle"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
    "bad config": (configured("{"), "cannot be read"),
    "config is a list": (configured("[]"), "has no peft_type"),
    "other method": (configured('{"peft_type": "IA3"}'), "of type IA3"),
    "NaN": (rewrite(lambda t: t[KEY + "moslora_A.weight"].fill_(float("nan"))), "NaN or infinite"),
    "no mixer": (rewrite(lambda t: t.pop(KEY + "moslora_M.weight")), "lacks its mixer"),
    "no B": (rewrite(lambda t: t.pop(KEY + "moslora_B.weight")), "lacks its factor B"),
    "wrong rank": (rewrite(lambda t: t.update({KEY + "moslora_A.weight": torch.ones(5, 32)})), "rank"),
    "empty tensor": (rewrite(lambda t: t.update({KEY + "moslora_A.weight": torch.ones(0)})), "is empty"),
    "strange": (rewrite(lambda t: t.update({KEY + "moslora_C.weight": torch.ones(1)})), "unknown form"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_adapter_is_named_and_nothing_is_written(saved: Path, tmp_path: Path, name: str) -> None:
    change, message = BREAKAGES[name]
    change(saved)
    with pytest.raises(AdapterError, match=message):
        export_adapter(saved, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native"]


@pytest.mark.parametrize("mark", ["lora_AB", "lora_mixer"])
def test_a_lora_directory_that_carries_a_mixer_is_told_apart(tmp_path: Path, mark: str) -> None:
    lora.write(adapter(), tmp_path)
    rewrite(lambda t: t.update({f"base_model.model.layers.0.q.{mark}.weight": torch.eye(4)}))(tmp_path)
    assert detect(tmp_path) == "official"
    with pytest.raises(AdapterError, match="stock PEFT drops it"):
        lora.read(tmp_path)


def test_wrong_paths_name_the_nearest(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"Did you mean .*native"):
        read_adapter(tmp_path / "natve")
    with pytest.raises(AdapterError, match=r"Did you mean .*native"):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match="is a file"):
        read_adapter(saved / "adapter_config.json")


def test_a_full_disk_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moslora.adapters.formats.tensors.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export_adapter(saved, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native"]


@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_garbage_never_gives_an_adapter_or_another_error(tmp_path_factory, at: int, garbage: bytes) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("fuzz")
    native.write(adapter(), folder)
    intact = folder.with_name(folder.name + "-intact")
    shutil.copytree(folder, intact)
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[at : at + len(garbage)] = garbage
    path.write_bytes(data)
    try:
        found = read_adapter(folder)
    except AdapterError:
        return
    # Values may be other numbers; what is read must still be whole.
    assert found.modules.keys() == read_adapter(intact).modules.keys()


def test_a_changed_tensor_beside_the_factors_fails_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "native")
    honest = lora.write

    def careless(found: Adapter, folder: Path) -> None:
        honest(Adapter(found.modules, found.config, {n: t + 1 for n, t in found.extra.items()}), folder)

    monkeypatch.setitem(FORMATS, "lora", dataclasses.replace(FORMATS["lora"], write=careless))
    with pytest.raises(ProofError, match="lost or changed"):
        export_adapter(tmp_path / "native", tmp_path / "out")
    assert not (tmp_path / "out").exists()
