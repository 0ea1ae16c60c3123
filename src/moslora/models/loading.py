"""Load a base model, its tokenizer or its configuration with transformers.

Nothing here opens a pickle, and a load that leaves a weight at its random start is an error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.compat.deepspeed import unsplit
from moslora.compat.gguf_loading import no_gguf_bar
from moslora.distributed import launched
from moslora.errors import ModelError
from moslora.models.names import ModelSource
from moslora.terminal import warn
from moslora.wording import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "build_skeleton",
    "call_loader",
    "check_loaded",
    "default_device",
    "load_config",
    "load_model",
    "load_tokenizer",
    "load_with_info",
    "quantization_options",
    "quiet_transformers",
]


# The blocks of quiet_transformers that are open, in all threads, and what the first of them found.
_quiet_lock = threading.Lock()
_quiet_blocks: list[None] = []
_before_quiet: list[Any] = []


def default_device() -> str:
    """Return ``"cuda"`` where there is one, else ``"cpu"``; of several launched processes each has a GPU of its own."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() > 1 else "cuda"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports inside the block, and only there."""
    from transformers.utils import logging

    with _quiet_lock:
        if not _quiet_blocks:
            _before_quiet[:] = [logging.get_verbosity(), logging.is_progress_bar_enabled()]
            logging.set_verbosity_error()
            logging.disable_progress_bar()
            bar = no_gguf_bar()
            bar.__enter__()
            _before_quiet.append(bar)
        _quiet_blocks.append(None)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_blocks.pop()
            if (
                not _quiet_blocks
            ):  # of blocks in several threads the last one puts back what the first one found
                verbosity, bars, bar = _before_quiet
                bar.__exit__(None, None, None)
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
    placement: str = "device",
) -> PreTrainedModel:
    """Load a model, whole or not at all.

    Args:
        source: From ``resolve_model`` or ``materialize``.
        dtype: ``"auto"`` (float32 on a CPU, the checkpoint's own elsewhere) or a key of ``ITEM_SIZE``.
        trust_remote_code: Whether code that comes with the model may run.
        attn_implementation: As transformers names it; None lets it choose.
        device: Where the weights go.
        auto_class: Class of transformers that loads it.
        quantization: From ``quantization_options``.
        placement: ``"device"``; ``"memory"`` where a trainer will bring each process's part of it there; ``"auto"``
            spreads the layers over all of this process's GPUs.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: If it cannot be loaded, or a weight is missing or of the wrong shape. Weights that the
            architecture has no use for are a warning.
    """
    model, info = load_with_info(
        source, dtype, trust_remote_code, attn_implementation, device, auto_class, quantization, placement
    )
    check_loaded(source, info)
    return model


def load_with_info(
    source: ModelSource,
    dtype: str,
    trust_remote_code: bool,
    attn_implementation: str | None,
    device: str,
    auto_class: str,
    quantization: dict[str, Any] | None,
    placement: str = "device",
    **more: Any,
) -> tuple[Any, dict[str, Any]]:
    """Load a model, and what transformers says of its weights; arguments are those of ``load_model``.

    Args:
        **more: Further arguments of ``from_pretrained``.

    Returns:
        The model, in evaluation mode, and the loading info, which nobody has judged.
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
        options |= _dequantized()
    if quantization:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**quantization)
    if placement == "auto":
        options["device_map"] = "auto"
    elif placement == "device" and (quantization or not on_cpu):
        options["device_map"] = {"": device}
    model, info = call_loader(source, getattr(transformers, auto_class).from_pretrained, {**options, **more})
    return model.eval(), info


def quantization_options(
    kind: str, dtype: str, device: str, whole: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Return how a base is quantized while it is loaded.

    Args:
        kind: ``"none"``, or ``"nf4"``: 4-bit normal floats, their scales quantized too (QLoRA, arXiv:2305.14314).
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
        dtype = "float32" if device.startswith("cpu") else _narrow_dtype()
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_skip_modules": list(whole) or None,
    }


def _narrow_dtype() -> str:
    """Return the 16-bit dtype that the GPU computes in: float16 where it could only emulate bfloat16."""
    import torch

    has_bfloat16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float16"


def build_skeleton(
    source: ModelSource,
    auto_class: str,
    trust_remote_code: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Build a model from its configuration alone, to count its parameters by.

    Args:
        source: From ``resolve_model`` or ``materialize``.
        auto_class: Class of transformers that would load it.
        trust_remote_code: Whether code that comes with the model may run.
        settings: Of its configuration, over those on disk, as the size of a head.

    Returns:
        The model on the meta device, without memory for its weights.

    Raises:
        ModelError: If its configuration cannot be read.
    """
    import torch
    import transformers

    options = {"trust_remote_code": trust_remote_code}
    config = call_loader(source, transformers.AutoConfig.from_pretrained, {**options, **_origin(source)})
    for name, value in (settings or {}).items():
        setattr(config, name, value)

    def build(_: str, **options: Any) -> Any:
        with torch.device("meta"), unsplit():
            return getattr(transformers, auto_class).from_config(config, **options)

    return call_loader(source, build, options)


def load_tokenizer(source: ModelSource, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        source: From ``resolve_model`` or ``materialize``.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The tokenizer, its special tokens as the model's author set them.

    Raises:
        ModelError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    options = {"trust_remote_code": trust_remote_code, **_origin(source)}
    return call_loader(source, AutoTokenizer.from_pretrained, options)


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
    return call_loader(source, AutoConfig.from_pretrained, options)


def _origin(source: ModelSource) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that say which file or revision."""
    if source.gguf_file is not None:
        return {"gguf_file": source.gguf_file.name}
    return {"revision": source.revision} if source.revision else {}


def _dequantized() -> dict[str, Any]:
    """Ask for plain weights, where transformers (5.20 and later) could also keep GGUF's blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def call_loader(source: ModelSource, load: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Call a loader of transformers or diffusers quietly, and turn what it raises into one sentence.

    Args:
        source: What is loaded.
        load: The loader; takes the path or hub id first.
        options: Its keyword arguments.

    Returns:
        What it returns.

    Raises:
        ModelError: If it cannot be loaded; what to do is in the message.
        MemoryError, torch.OutOfMemoryError: As the loader raised it.
    """
    try:
        with quiet_transformers():
            return load(source.path, **options)
    except ImportError as error:
        raise ModelError(
            f"{source.name} needs a package that is not installed: {first_line(error)}"
        ) from error
    except MemoryError:  # says nothing about the model, as the next
        raise
    except Exception as error:  # damaged files surface as whatever their reader raises
        if _is_out_of_memory(error):
            raise
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
        raise ModelError(f"{source.name} cannot be loaded: {first_line(error)}{hint}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)


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


def check_loaded(source: ModelSource, info: dict[str, Any]) -> None:
    """Refuse a model of which a weight kept its random start; transformers only reports it.

    Args:
        source: What was loaded.
        info: The loading info that ``from_pretrained(output_loading_info=True)`` returns.

    Raises:
        ModelError: If a weight is missing or has another shape.
    """
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(key) for key in info.get(problem) or ())
        if found:
            raise ModelError(
                f"{source.name} does not match its architecture: {len(found)} {problem.replace('_', ' ')}, "
                f"{', '.join(found[:3])}. The checkpoint is incomplete, or config.json belongs to another model."
            )
    unused = sorted(str(key) for key in info.get("unexpected_keys") or ())
    if unused:
        warn(
            f"{source.name} has {len(unused)} weights that its architecture does not use: {unused[:3]}.",
            stacklevel=3,
        )
