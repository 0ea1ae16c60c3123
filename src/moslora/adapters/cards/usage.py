"""How to load an adapter, by its format and by what runs it: lines of a card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moslora.adapters.cards.base_name import BaseName
from moslora.adapters.cards.markdown import code, fenced, literal, plain
from moslora.adapters.engines.predict import predict
from moslora.adapters.factors import Adapter

__all__ = ["AUTO_CLASSES", "Loading", "how_to_load"]

# PEFT's task type → the class of transformers that loads the base.
AUTO_CLASSES: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Loading:
    """What is to be loaded.

    Attributes:
        format: One of ``formats.table.WRITTEN``.
        adapter: The adapter.
        base: What its base is called.
        auto_class: Class of transformers that loads the base; None if it is not known.
        file: Name of the weights, where the format is a single file.
    """

    format: str
    adapter: Adapter
    base: BaseName
    auto_class: str | None = None
    file: str = ""

    @property
    def called(self) -> str:
        """What to write for the base in code."""
        return self.base.hub or "BASE"

    @property
    def r(self) -> int:
        """The largest rank."""
        return max((factors.r for factors in self.adapter.modules.values()), default=0)


def how_to_load(loading: Loading) -> list[str]:
    """Return the section of a card that says how to load an adapter, as lines of Markdown.

    Args:
        loading: What is to be loaded.
    """
    lines = ["## How to load it", ""]
    if loading.base.hub is None:
        named = f", which was {code(loading.base.name)} when it was trained" if loading.base.name else ""
        lines += [
            f"`BASE` is the base model{named}: write its folder or hub id there, and `REPO` for this adapter.",
            "",
        ]
    else:
        lines += ["`REPO` is this adapter's id on the Hub, or its folder.", ""]
    for title, part in _WAYS.get(loading.format, _lora)(loading):
        lines += [f"**{title}**", "", *part, ""]
    return lines


def _base_lines(loading: Loading) -> tuple[list[str], str]:
    kind = _class_of(loading)
    remark = "" if kind else "  # or the class of its task"
    kind = kind or "AutoModelForCausalLM"
    return [
        f"from transformers import {kind}"
    ], f"base = {kind}.from_pretrained({literal(loading.called)}){remark}"


def _class_of(loading: Loading) -> str | None:
    """Return the class that loads the base; None if nothing tells it."""
    return loading.auto_class or AUTO_CLASSES.get(str(loading.adapter.config.get("task_type")))


def _peft(loading: Loading, *before: str) -> list[str]:
    parts: Mapping[str, Any] = loading.adapter.config.get("components") or {}
    if parts:
        lines = [f"pipe = DiffusionPipeline.from_pretrained({literal(loading.called)})"]
        lines += [
            f"pipe.{name} = PeftModel.from_pretrained(pipe.{name}, {literal('REPO')}, subfolder={literal(name)})"
            for name in parts
        ]
        heads = ["from diffusers import DiffusionPipeline", "from peft import PeftModel"]
        return fenced("python", [*before, *heads, "", *lines])
    imports, load = _base_lines(loading)
    return fenced(
        "python",
        [
            *before,
            "from peft import PeftModel",
            *imports,
            "",
            load,
            'model = PeftModel.from_pretrained(base, "REPO")',
        ],
    )


def _vllm(loading: Loading) -> Iterator[tuple[str, list[str]]]:
    if "components" in loading.adapter.config or not _is_causal(loading):
        return
    found = predict("vllm", loading.adapter)
    faults = found.faults
    if faults:
        yield (
            _titled("vLLM", loading),
            [f"Not as it is: {plain(faults[0].what)} {plain(faults[0].fix)}"],
        )
        return
    flags = "".join(f" {flag}" for flag in found.flags)
    command = f"vllm serve {loading.called} --enable-lora --lora-modules tuned=REPO{flags}"
    yield _titled("vLLM", loading), fenced("sh", [command])


def _is_causal(loading: Loading) -> bool:
    """Return whether it may be a language model's, which is all that many configurations leave open."""
    return _class_of(loading) in (None, "AutoModelForCausalLM")


def _titled(name: str, loading: Loading) -> str:
    return name if _class_of(loading) else f"{name}, if the base is a language model"


def _lora(loading: Loading) -> Iterator[tuple[str, list[str]]]:
    yield "PEFT", _peft(loading)
    yield from _vllm(loading)
    if "components" in loading.adapter.config:
        yield "diffusers", fenced("sh", ["moslora export REPO style.safetensors --to diffusers"])
    elif _is_causal(loading):
        yield (
            _titled("llama.cpp", loading),
            fenced(
                "sh",
                [
                    f"moslora export REPO adapter.gguf --to gguf --base {loading.called}",
                    "llama-cli -m base.gguf --lora adapter.gguf",
                ],
            ),
        )


def _native(loading: Loading) -> Iterator[tuple[str, list[str]]]:
    comment = "import moslora  # registers the method with PEFT: pip install moslora"
    yield "PEFT, to train it further", _peft(loading, comment)
    yield (
        "Everything else",
        [
            "Its mixers are not folded yet, and PEFT alone refuses it. Fold it into a plain LoRA first:",
            "",
            *fenced("sh", ["moslora export REPO my-lora --to lora"]),
        ],
    )


def _gguf(loading: Loading) -> Iterator[tuple[str, list[str]]]:
    yield "llama.cpp", fenced("sh", [f"llama-cli -m base.gguf --lora {loading.file or 'adapter.gguf'}"])


def _diffusers(loading: Loading) -> Iterator[tuple[str, list[str]]]:
    yield (
        "diffusers",
        fenced(
            "python",
            [
                "from diffusers import DiffusionPipeline",
                "",
                f"pipe = DiffusionPipeline.from_pretrained({literal(loading.called)})",
                f'pipe.load_lora_weights("REPO", weight_name={literal(loading.file)})',
            ],
        ),
    )
    yield "ComfyUI", fenced("sh", ["moslora export FILE style.safetensors --for comfyui"])


def _kohya(loading: Loading) -> Iterator[tuple[str, list[str]]]:
    if "unet" in loading.adapter.config.get("components", ("unet",)):
        yield "ComfyUI, A1111", [f"Put {code(loading.file)} into their folder of LoRAs."]
        yield from list(_diffusers(loading))[:1]
    else:
        yield from _original(loading)


def _original(loading: Loading) -> Iterator[tuple[str, list[str]]]:
    yield "ComfyUI", [f"Put {code(loading.file)} into its folder of LoRAs."]


_WAYS = {
    "lora": _lora,
    "native": _native,
    "gguf": _gguf,
    "diffusers": _diffusers,
    "kohya": _kohya,
    "original": _original,
}
