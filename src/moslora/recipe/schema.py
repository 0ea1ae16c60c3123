"""The recipe: what a run shall do, typed and checked before anything heavy is loaded.

A recipe is a YAML file, ``section.key=value`` overrides, or both::

    model: smollm2-135m-instruct
    data: requests.jsonl
    adapter: {r: 16, mixer: orthogonal}
    trainer: {learning_rate: 1e-3, max_steps: 200}

Sections ``adapter`` and ``trainer`` belong to other libraries: their keys are the fields of ``MoSLoRAConfig``
and of TRL's ``SFTConfig``, looked up where they are defined. Everything wrong is reported at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import to_jsonable_python

from moslora import versions
from moslora.errors import RecipeError

__all__ = [
    "ADAPTER_DEFAULTS",
    "TRAINER_DEFAULTS",
    "DataSection",
    "MixSection",
    "ModelSection",
    "OutputSection",
    "Recipe",
    "TaskSection",
    "build_trainer_config",
    "load_recipe",
    "resolve_trainer_arguments",
]


# --- What a recipe says -------------------------------------------------------------------------------------

Name = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    # Strict, because YAML knows its types: ``seed: true`` is a mistake and not a 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TaskSection(_Section):
    """What is learned, and how it is judged."""

    kind: Literal["text"] = "text"
    metric: Literal["none", "json", "text"] = "none"
    generate_examples: int = Field(default=100, ge=0)
    max_new_tokens: int = Field(default=128, ge=1)
    samples: int = Field(default=6, ge=0)


class ModelSection(_Section):
    """The base model: a packaged name, a hub id, a folder or a GGUF file."""

    name: Name
    revision: Name | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    attn_implementation: Name | None = None
    quantization: Literal["none", "nf4"] = "none"


class DataSection(_Section):
    """The examples: files or hub ids."""

    train: Name
    heldout: Name | None = None
    heldout_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    train_split: Name = "train"
    heldout_split: Name | None = None
    format: Literal["auto", "messages", "prompt-completion", "text", "alpaca"] = "auto"
    template: Literal["auto", "chat", "plain"] = "auto"
    train_on: Literal["completions", "all"] = "completions"
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    limit: int | None = Field(default=None, ge=1)


class VisionTaskSection(TaskSection):
    """What is learned from pictures, and how it is judged."""

    kind: Literal["vision"] = "vision"  # type: ignore[assignment]
    metric: Literal["none", "json", "text", "short", "choice"] = "none"  # type: ignore[assignment]
    shuffle_images: bool = True


class VisionDataSection(DataSection):
    """Examples with pictures: LLaVA's JSON, or messages beside a list of images."""

    images: Name | None = None
    bad_images: Literal["refuse", "skip"] = "refuse"
    max_pixels: int = Field(default=50_000_000, ge=1)


class _Scopes(_Section):
    """Parts of a model; what is said of one part's adapter wants that part adapted."""

    @model_validator(mode="after")
    def _all_used(self) -> Self:
        for name in type(self).model_fields:
            part, _, what = name.rpartition("_")
            if (
                what in ("r", "alpha")
                and getattr(self, name) is not None
                and getattr(self, part) != "adapter"
            ):
                raise ValueError(f"one with {part}: adapter where {name} is given")
        return self


class ScopesSection(_Scopes):
    """Which parts of a vision-language model are adapted, trained in full, or left alone."""

    language: Literal["adapter", "frozen"] = "adapter"
    vision: Literal["adapter", "frozen"] = "frozen"
    projector: Literal["adapter", "full", "frozen"] = "adapter"
    language_r: int | None = Field(default=None, ge=1)
    language_alpha: float | None = Field(default=None, gt=0)
    vision_r: int | None = Field(default=None, ge=1)
    vision_alpha: float | None = Field(default=None, gt=0)
    projector_r: int | None = Field(default=None, ge=1)
    projector_alpha: float | None = Field(default=None, gt=0)


class ImageModelSection(_Section):
    """The base pipeline: a diffusers folder or a hub id."""

    name: Name
    revision: Name | None = None
    variant: Name | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class ImageTaskSection(_Section):
    """How a denoiser is trained on pictures, and what is shown of it."""

    kind: Literal["image"] = "image"
    prompts: list[Name] = []
    prompts_file: Name | None = None
    published_prompts: Literal["none", "object", "live"] = "none"
    pictures_per_prompt: int = Field(default=1, ge=1)
    pictures_every: int | None = Field(default=None, ge=1)
    inference_steps: int = Field(default=25, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0)
    negative_prompt: str | None = None
    max_sequence_length: int | None = Field(default=None, ge=1, le=512)
    clip_model: Name | None = None
    dino_model: Name | None = None
    loss_draws: int = Field(default=8, ge=1)
    snr_gamma: float | None = Field(default=None, gt=0)
    noise_offset: float = Field(default=0.0, ge=0)
    timesteps: Literal["auto", "uniform", "logit-normal"] = "auto"
    prior_weight: float = Field(default=1.0, gt=0)


class ImageDataSection(_Section):
    """Folders of pictures, and how they become what a denoiser sees."""

    train: Name
    heldout: Name | None = None
    prompt: Name | None = None
    token: Name | None = None
    class_name: Name | None = None
    resolution: int | None = Field(default=None, ge=8)
    crop: Literal["center", "random"] = "center"
    crops: int = Field(default=4, ge=1)
    flip: bool = False
    class_images: Name | None = None
    class_prompt: Name | None = None
    class_count: int = Field(default=100, ge=1)
    bad_images: Literal["refuse", "skip"] = "refuse"
    max_pixels: int = Field(default=50_000_000, ge=1)
    limit: int | None = Field(default=None, ge=1)


class ImageScopesSection(_Scopes):
    """Which parts of a pipeline are adapted beside its denoiser."""

    text_encoders: Literal["adapter", "frozen"] = "frozen"
    text_encoders_r: int | None = Field(default=None, ge=1)
    text_encoders_alpha: float | None = Field(default=None, gt=0)


class OutputSection(_Section):
    """Where the run directory goes."""

    dir: Name = "runs"
    name: Name | None = None

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str | None) -> str | None:
        if name is not None and (name in (".", "..") or re.search(r'[\x00-\x1f/\\<>:"|?*]', name)):
            raise ValueError("the plain name of a folder; its parent belongs to output.dir")
        return name


class MixSection(_Section):
    """Trained adapters whose common mixer is learned, their factors frozen. See ``moslora mix``."""

    adapters: list[Name] = Field(min_length=1)
    weights: list[float] | None = None


class Recipe(_Section):
    """A whole recipe. Make one with ``load_recipe``, which also checks ``adapter`` and ``trainer``.

    Example:
        >>> recipe = load_recipe(["model=org/base", "data=org/examples", "adapter.r=8"])
        >>> recipe.adapter["r"], recipe.data.train_on
        (8, 'completions')
    """

    task: TaskSection = TaskSection()
    model: ModelSection
    data: DataSection
    adapter: dict[str, Any] = {}
    mix: MixSection | None = None
    trainer: dict[str, Any] = {}
    output: OutputSection = OutputSection()
    seed: int = Field(default=0, ge=0, lt=2**32)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every default written out; reading it back gives an equal recipe."""
        values = self.model_dump()
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class VisionRecipe(Recipe):
    """A recipe of ``task: vision``."""

    task: VisionTaskSection = VisionTaskSection()
    data: VisionDataSection
    scopes: ScopesSection = ScopesSection()


class ImageRecipe(Recipe):
    """A recipe of ``task: image``."""

    task: ImageTaskSection = ImageTaskSection()  # type: ignore[assignment]
    model: ImageModelSection  # type: ignore[assignment]
    data: ImageDataSection  # type: ignore[assignment]
    scopes: ImageScopesSection = ImageScopesSection()


# What a recipe may say, by the kind of its task.
RECIPES: dict[str, type[Recipe]] = {"text": Recipe, "vision": VisionRecipe, "image": ImageRecipe}

ADAPTER_DEFAULTS: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "mixer": "kaiming",
}

# Those that a kind has otherwise. A denoiser's are the method's paper's, on SDXL.
ADAPTER_DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "image": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["to_k", "to_out.0", "to_q", "to_v"],
        "mixer": "orthogonal",
    }
}

# What a section means when it is one plain value.
SHORTHANDS: dict[str, str] = {"task": "kind", "model": "name", "data": "train", "output": "name"}

# What goes with the value that a shorthand on the command line replaces: another data set's held-out file or
# another model's revision would be wrong without anybody noticing.
BELONGING: dict[str, tuple[str, ...]] = {
    "task": (),
    "model": ("revision", "variant"),
    "data": (
        *("heldout", "train_split", "heldout_split", "format"),
        *("prompt", "token", "class_name", "class_images", "class_prompt"),
    ),
    "output": (),
}

# Settings that the run decides, and where the wish behind them is fulfilled.
MANAGED: dict[str, str] = {
    "trainer.output_dir": "the run directory holds it; set output.dir and output.name",
    "trainer.resume_from_checkpoint": "use `moslora train --resume RUN`",
    "trainer.do_train": "a run always trains",
    "trainer.do_eval": "a run always evaluates before and after; trainer.eval_strategy adds to that",
    "trainer.do_predict": "set task.generate_examples",
    "trainer.trust_remote_code": "set model.trust_remote_code",
    "trainer.completion_only_loss": "set data.train_on",
    "trainer.assistant_only_loss": "every assistant turn is trained on; set data.train_on=all for every token",
    "trainer.chat_template_path": "a model's own template is used; set data.template=plain to do without",
    "trainer.dataset_text_field": "the column is called text; set data.format=text",
    "trainer.dataset_kwargs": "examples are encoded before the trainer sees them; see the data section",
    "trainer.eos_token": "the tokenizer's own ends a text, the chat template's own ends a turn",
    "trainer.model_init_kwargs": "set model.dtype, model.revision or model.attn_implementation",
    "trainer.hub_token": "a recipe is kept with its run, so it may hold no secret; set HF_TOKEN instead",
    "adapter.peft_type": "it is always MOSLORA",
    "adapter.task_type": "the task sets it",
    "adapter.auto_mapping": "PEFT sets it",
    "adapter.base_model_name_or_path": "set model.name",
    "adapter.revision": "set model.revision",
    "adapter.inference_mode": "a run trains",
    "adapter.peft_version": "PEFT sets it",
    "adapter.unlike_lora": "the model fills it in",
    "adapter.values_in_file": "saving fills it in",
}

# Names from older versions, from other programs, or without their section.
MISNAMED: dict[str, str] = {
    "adapter.rank": "adapter.r",
    "adapter.alpha": "adapter.lora_alpha",
    "adapter.dropout": "adapter.lora_dropout",
    "trainer.lr": "trainer.learning_rate",
    "trainer.epochs": "trainer.num_train_epochs",
    "trainer.batch_size": "trainer.per_device_train_batch_size",
    "trainer.warmup_ratio": "trainer.warmup_steps, where a value below 1 is the fraction of all steps",
    "trainer.max_seq_length": "trainer.max_length",
    "trainer.evaluation_strategy": "trainer.eval_strategy",
    "trainer.group_by_length": "trainer.train_sampling_strategy: group_by_length",
    "data.path": "data.train",
    "data.test": "data.heldout",
    "data.eval": "data.heldout",
    "data.validation": "data.heldout",
    "model.path": "model.name",
    "lora": "adapter",
    "peft": "adapter",
    "training": "trainer",
    "dataset": "data",
    "r": "adapter.r",
    "lora_alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout",
    "target_modules": "adapter.target_modules",
    "mixer": "adapter.mixer",
    "lr": "trainer.learning_rate",
    "learning_rate": "trainer.learning_rate",
    "epochs": "trainer.num_train_epochs",
    "num_train_epochs": "trainer.num_train_epochs",
    "max_steps": "trainer.max_steps",
    "max_length": "trainer.max_length",
    "batch_size": "trainer.per_device_train_batch_size",
    "per_device_train_batch_size": "trainer.per_device_train_batch_size",
}


# --- YAML ---------------------------------------------------------------------------------------------------

# YAML 1.2's core schema. PyYAML speaks 1.1, where `no` is False, 1e-3 is a text and 010 is 8.
CORE_SCHEMA: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    """Safe YAML with the core schema, in which no key may stand twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, Any] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem=f"a key must be a plain name, not {getattr(key, 'value', None)!r}",
                    problem_mark=key.start_mark,
                )
            if key.value in seen:
                line = seen[key.value].line + 1
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} stands here again; it was set in line {line}",
                    problem_mark=key.start_mark,
                )
            seen[key.value] = key.start_mark
        return super().construct_mapping(node, deep=deep)

    def construct_core_int(self, node: Any) -> int:
        text = node.value
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes what the loader above would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Unicode's own line breaks fold into spaces in every style but this one, which escapes them.
        style = '"' if re.search(r"[\x85\u2028\u2029\ufeff]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}  # PyYAML's own, which are YAML 1.1
    for _tag, _pattern, _first in CORE_SCHEMA:
        _letters = [*_first, ""] if _tag == "null" else [*_first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _letters)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)
_Dumper.add_representer(str, _Dumper.represent_text)


def _parse(text: str, where: str) -> Any:
    """Read one YAML document; ``where`` opens the message of an error."""
    try:
        value = yaml.load(text, Loader=_Loader)
        # Gives every alias its own copy, and refuses an anchor that holds itself.
        return to_jsonable_python(value)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{where}: {at}{error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())}.") from None
    except ValueError as error:
        raise RecipeError(f"{where}: this cannot be read as YAML: {error}.") from None
    except RecursionError:
        raise RecipeError(f"{where}: it is nested too deeply to be a recipe.") from None


# --- Reading ------------------------------------------------------------------------------------------------

LARGEST_RECIPE = 1 << 20  # bytes; somebody who names a data file or a model is told so


def load_recipe(arguments: Sequence[str], base: Path | None = None) -> Recipe:
    """Read a recipe as the command line gives it.

    Args:
        arguments: An optional path of a YAML file (anything without ``=``), then overrides,
            ``section.key=value`` or ``section=value``. Values are YAML: ``1e-3``, ``[q_proj, v_proj]``,
            ``null``. A shorthand as ``data=new.jsonl`` also forgets what belonged to the old value, such as
            its held-out file.
        base: The folder that stands for the current one.

    Returns:
        The recipe, with its defaults filled in. Paths that exist are absolute: those in a file are looked
        for beside that file, then in the current folder; those of overrides in the current folder.

    Raises:
        RecipeError: If anything is wrong; all of it is named.
        VersionError: If PEFT, transformers or TRL is older than the command's tasks are written for.
    """
    versions.require_for_command()
    here = Path(base) if base is not None else Path.cwd()
    arguments = list(arguments)
    if not arguments:
        raise RecipeError("There is no recipe: give a YAML file, or at least model=… and data=….")
    raw: dict[str, Any] = {}
    if "=" not in arguments[0] or (here / arguments[0]).is_file():
        path = here / _path(arguments.pop(0))
        raw = _expand(_read(path))
        for section, values in raw.items():
            _anchor(section, values, (path.parent, here))
    problems: list[str] = []
    _override(raw, arguments, here, problems)
    return _check(raw, here, problems)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path's raises for a user that does not exist


def _read(path: Path) -> dict[str, Any]:
    """Read a recipe file into its sections."""
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
        hint = f" Did you mean {path / inside[0]}?" if inside else " Give the YAML file."
        raise RecipeError(f"{path} is a folder, not a recipe.{hint}")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"Did you mean {path.parent / near[0]}?" if near else "A setting is written key=value."
        raise RecipeError(f"{path} does not exist. {hint}")
    try:
        with path.open("rb") as file:
            head = file.read(LARGEST_RECIPE + 1)
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error
    if "\0" in text or len(head) > LARGEST_RECIPE:
        what = "is a binary file" if "\0" in text else "has more than 1 MiB"
        raise RecipeError(f"{path} {what}, so it is no recipe. Name data as data=… and a model as model=….")
    value = _parse(text, str(path))
    if value is None:
        raise RecipeError(f"{path} is empty. A recipe needs at least model: … and data: ….")
    if not isinstance(value, dict):
        what = "a list" if isinstance(value, list) else f"the single value {value!r}"
        raise RecipeError(f"{path} holds {what}; a recipe has sections: {', '.join(Recipe.model_fields)}.")
    return value


def _expand(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Replace shorthands and empty sections by what they stand for."""
    return {section: _section(section, value) for section, value in raw.items()}


def _section(section: str, value: Any) -> Any:
    if value is None and section in {*Recipe.model_fields, "scopes"} and section not in ("seed", "mix"):
        return {}
    if section not in SHORTHANDS or not isinstance(value, str):
        return value
    if section == "output" and "/" in value:
        path = _path(value)
        return {"dir": str(path.parent), "name": path.name}
    return {SHORTHANDS[section]: value}


def _anchor(section: str, values: Any, folders: Sequence[Path]) -> None:
    """Make paths that exist absolute, in place. Others stay: hub ids, or for the reader to complain about."""
    for key in PATHS.get(section, ()) if isinstance(values, dict) else ():
        value = values.get(key)
        if isinstance(value, list):
            values[key] = [_found(item, folders) for item in value]
        elif value is not None:
            values[key] = _found(value, folders)


def _found(value: Any, folders: Sequence[Path]) -> Any:
    """Return a path that exists as an absolute one, everything else as it is."""
    if not isinstance(value, str) or not value or "\0" in value:
        return value
    for folder in folders:
        place = folder / _path(value)
        with contextlib.suppress(OSError):  # too long for a path, or not ours to look at
            if place.exists():
                return str(place.absolute())
    return value


def _override(raw: dict[str, Any], arguments: Sequence[str], here: Path, problems: list[str]) -> None:
    """Apply ``key=value`` arguments in place, whole sections first."""
    settings: list[tuple[str, Any]] = []
    for argument in arguments:
        place, equals, text = argument.partition("=")
        if not equals or not all(part and part == part.strip() for part in place.split(".")):
            problems.append(
                f"{argument!r} is no setting; write section.key=value, after one recipe file at most."
            )
            continue
        try:
            value = _parse(text, place)
        except RecipeError as error:
            problems.extend(error.problems)
            continue
        # What reads as a number may still be a name, as a commit hash of digits is.
        settings.append((place, text if isinstance(value, int | float) and _is_text(place) else value))
    for place, value in sorted(settings, key=lambda setting: "." in setting[0]):
        # A module's name has points of its own: adapter.rank_pattern.model.layers.0.q_proj=4
        section, *keys = place.split(".", 2)
        if keys:
            values = raw.setdefault(section, {})
            for key in keys[:-1]:
                if isinstance(values, dict) and values.get(key) is None:
                    values[key] = {}
                values = values[key] if isinstance(values, dict) else values
            if not isinstance(values, dict):
                problems.append(
                    f"{place} cannot be set, because what holds it is the single value {values!r}."
                )
                continue
            values[keys[-1]] = value
            if len(keys) == 1:
                _anchor(section, values, (here,))
        else:
            new, old = _section(section, value), raw.get(section)
            _anchor(section, new, (here,))
            if isinstance(value, str) and section in SHORTHANDS and isinstance(old, dict):
                new = {**{key: old[key] for key in old if key not in BELONGING[section]}, **new}
            raw[section] = new


def _is_text(place: str) -> bool:
    """Whether a place of the recipe's own sections takes a text."""
    section, _, key = place.partition(".")
    key = key or SHORTHANDS.get(section, "")
    fields = [
        sections[section].model_fields[key]
        for sections in SECTIONS_OF.values()
        if section in sections and key in sections[section].model_fields
    ]
    texts = (str, Name, Name | None, str | None)
    return bool(fields) and all(field.annotation in texts for field in fields)


# --- Checking -----------------------------------------------------------------------------------------------

SECTIONS: dict[str, type[BaseModel]] = {
    "task": TaskSection,
    "model": ModelSection,
    "data": DataSection,
    "mix": MixSection,
    "output": OutputSection,
    "scopes": ScopesSection,
}
# Those of each kind.
SECTIONS_OF: dict[str, dict[str, type[BaseModel]]] = {
    "text": SECTIONS,
    "vision": {**SECTIONS, "task": VisionTaskSection, "data": VisionDataSection},
    "image": {
        **SECTIONS,
        "task": ImageTaskSection,
        "model": ImageModelSection,
        "data": ImageDataSection,
        "scopes": ImageScopesSection,
    },
}

PATHS: dict[str, tuple[str, ...]] = {
    "model": ("name",),
    "data": ("train", "heldout", "images", "class_images"),
    "task": ("prompts_file", "clip_model", "dino_model"),
    "mix": ("adapters",),
}

UNFIT_FOR_VISION = {
    "packing": "rows with pictures are not packed",
    "padding_free": "rows with pictures are padded",
}

# What has no place in the files that image programs read; better said before training than after.
UNFIT_FOR_IMAGES = {
    "use_dora": "kohya's file, which a run leaves too, holds no DoRA",
    "bias": "diffusers' files hold factors alone",
    "modules_to_save": "diffusers' files hold factors alone",
    "target_parameters": "diffusers' files hold factors alone",
    "trainable_token_indices": "diffusers' files hold factors alone",
}

UNFIT_FOR_IMAGE_TRAINERS = {
    "label_smoothing_factor": "a denoising loss has no labels",
    "train_sampling_strategy": "each picture comes once, in an order of the seed's, before any comes again",
    "neftune_noise_alpha": "a pipeline has no input embeddings; task.noise_offset changes the noise",
    "use_liger_kernel": "its kernels are language models'",
    "auto_find_batch_size": "which pictures a step sees is settled before training",
    "remove_unused_columns": "the run decides it",
    "activation_checkpointing_kwargs": "diffusers' own checkpointing takes none",
    "gradient_checkpointing_kwargs": "diffusers' own checkpointing takes none",
}

MISSING: dict[str, str] = {
    "model": "name the base model, as in model=smollm2-135m-instruct",
    "data": "name the examples, as in data=examples.jsonl",
    "mix": "name the trained adapters, as in mix.adapters=[runs/a/adapter, runs/b/adapter]",
}


def _check(raw: dict[str, Any], here: Path, problems: list[str]) -> Recipe:
    """Check a recipe as a whole; ``problems`` are those found before."""
    task = raw.get("task")
    kind = task.get("kind", "text") if isinstance(task, dict) else "text"
    defaults = ADAPTER_DEFAULTS | ADAPTER_DEFAULTS_OF.get(kind if isinstance(kind, str) else "", {})
    raw = {**raw, "adapter": _with_defaults(raw.get("adapter"), defaults), "trainer": raw.get("trainer", {})}
    if not isinstance(kind, str) or kind not in RECIPES:
        near = _did_you_mean(str(kind), RECIPES)
        kinds = " or ".join(map(repr, RECIPES))
        problems.append(f"task.kind is {_shown(kind)}, but must be {kinds}{near or '.'}")
        raw["task"] = {**raw["task"], "kind": "text"}
        kind = "text"
    recipe = None
    try:
        recipe = RECIPES[kind].model_validate(raw)
    except ValidationError as error:
        problems.extend(_explain(found, kind) for found in error.errors())
    if kind == "vision":
        given = raw["trainer"] if isinstance(raw["trainer"], dict) else {}
        problems.extend(
            f"trainer.{key} cannot be set: {why}." for key, why in UNFIT_FOR_VISION.items() if given.get(key)
        )
        if isinstance(raw["adapter"], dict) and raw["adapter"].get("target_modules") != "all-linear":
            problems.append(
                "adapter.target_modules cannot be set: set scopes.language, .vision and .projector."
            )
    if kind == "image":
        given = raw["adapter"] if isinstance(raw["adapter"], dict) else {}
        problems.extend(
            f"adapter.{key} cannot be set for task=image: {why}."
            for key, why in UNFIT_FOR_IMAGES.items()
            if given.get(key) not in (None, False, "none", [])
        )
        given = raw["trainer"] if isinstance(raw["trainer"], dict) else {}
        problems.extend(
            f"trainer.{key} cannot be set for task=image: {why}."
            for key, why in UNFIT_FOR_IMAGE_TRAINERS.items()
            if given.get(key)
        )
        if raw.get("mix") is not None:
            problems.append("mix cannot be set for task=image: adapters of pipelines are not mixed.")
    checked: dict[str, dict[str, Any]] = {}
    for section, fields in (("adapter", _adapter_fields()), ("trainer", _trainer_fields(kind))):
        if isinstance(raw[section], dict) and raw[section]:
            checked[section] = _check_fields(section, raw[section], fields, problems)
    if not any(problem.startswith("adapter.") for problem in problems) and "adapter" in checked:
        problems.extend(_adapter_complaint(checked["adapter"]))
    if problems or recipe is None:
        raise RecipeError(problems)
    folder = str((here / _path(recipe.output.dir)).absolute())
    output = recipe.output.model_copy(update={"dir": folder})
    changed: dict[str, Any] = {**checked, "output": output}
    if isinstance(recipe, ImageRecipe) and recipe.data.class_images is not None:
        # It may be made by the run, and is then found from anywhere.
        place = str((here / _path(recipe.data.class_images)).absolute())
        changed["data"] = recipe.data.model_copy(update={"class_images": place})
    return recipe.model_copy(update=changed)


def _with_defaults(adapter: Any, defaults: Mapping[str, Any]) -> Any:
    return {**defaults, **(adapter or {})} if isinstance(adapter, dict | None) else adapter


def _adapter_fields() -> dict[str, Any]:
    from moslora.tuner.config import MoSLoRAConfig

    return {**_fields(MoSLoRAConfig), "mixer": str}  # a tensor or callable has no place in YAML


def _adapter_complaint(arguments: dict[str, Any]) -> list[str]:
    """What the configuration itself says to values of the right type."""
    from moslora.tuner.config import MoSLoRAConfig

    init = arguments.get("init_lora_weights")
    if init in ("eva", "loftq"):
        return [
            f"adapter.init_lora_weights={init} cannot be set: a call in a script of yours has to follow it. Use "
            "get_peft_model there, or choose another start."
        ]
    try:
        MoSLoRAConfig(**arguments)
    except (ValueError, TypeError) as error:
        return [f"adapter: {error}"]
    return []


def _trainer_config(kind: str) -> Any:
    """Return the class that holds a trainer's arguments."""
    if kind == "image":
        from transformers import TrainingArguments

        return TrainingArguments
    from trl import SFTConfig

    return SFTConfig


def _trainer_fields(kind: str = "text") -> dict[str, Any]:
    return _fields(_trainer_config(kind))


def _fields(config: Any) -> dict[str, Any]:
    """Return the type of every argument of a dataclass."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}


def _check_fields(
    section: str, values: Mapping[str, Any], fields: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """Check names and types against a dataclass's, and return the values as those types."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        place = f"{section}.{name}"
        if place in MANAGED:
            problems.append(f"{place} cannot be set: {MANAGED[place]}.")
        elif name not in fields:
            problems.append(_unknown(place, fields))
        else:
            try:
                checked[name] = _convert(value, fields[name])
            except ValueError as error:
                problems.append(f"{place} is {_shown(value)}, but must be {error}")
    return checked


def _convert(value: Any, hint: Any) -> Any:
    """Convert a value to a field's type, or raise a ValueError that says what the type is."""
    kinds = typing.get_args(hint) or (hint,)
    choices = [str(c.value) for kind in kinds if _is_enum(kind) for c in kind]
    if choices and isinstance(value, str):
        # The union of an enum and str takes any text, and complains when the trainer is made.
        if value not in choices:
            raise ValueError(f"one of {', '.join(sorted(choices))}{_did_you_mean(value, choices) or '.'}")
        return value
    config = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=config)
    except (PydanticSchemaGenerationError, PydanticUserError):
        return value
    try:
        # Pydantic takes true for 1.
        if isinstance(value, bool) and bool not in kinds and value not in _literals(hint):
            raise ValueError(f"{_expected(hint)}.")
        return to_jsonable_python(adapter.validate_python(value))
    except ValidationError:
        raise ValueError(f"{_expected(hint)}.") from None


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _literals(hint: Any) -> list[Any]:
    """Return the values of every Literal in a type."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return [value for kind in typing.get_args(hint) for value in _literals(kind)]


EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
    Any: "anything",
}

EXPECTED_OF: dict[Any, Callable[[tuple[Any, ...]], str]] = {
    dict: lambda _: "a mapping",
    list: lambda kinds: f"a list (of {_expected(kinds[0])})" if kinds else "a list",
    set: lambda kinds: f"a list (of {_expected(kinds[0])})" if kinds else "a list",
    tuple: lambda _: "a list",
    Literal: lambda values: " or ".join(repr(value) for value in values),
    typing.Union: lambda kinds: " or ".join(dict.fromkeys(_expected(kind) for kind in kinds)),
    types.UnionType: lambda kinds: " or ".join(dict.fromkeys(_expected(kind) for kind in kinds)),
}


def _expected(hint: Any) -> str:
    """Say a type in words."""
    origin = typing.get_origin(hint) or hint
    if origin in EXPECTED_OF:
        return EXPECTED_OF[origin](typing.get_args(hint))
    if _is_enum(hint):
        return f"one of {', '.join(sorted(str(choice.value) for choice in hint))}"
    return EXPECTED.get(hint, getattr(hint, "__name__", str(hint)))


KINDS: dict[type, str] = {
    str: "a text",
    bool: "a truth value",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
}


def _shown(value: Any) -> str:
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return "null" if value is None else f"{shown} ({KINDS.get(type(value), type(value).__name__)})"


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown(place: str, names: Iterable[str]) -> str:
    """Say that a key is unknown, and which was probably meant."""
    names = list(names)
    if place in MISNAMED:
        return f"{place} is unknown; set {MISNAMED[place]}."
    hint = _did_you_mean(place.rpartition(".")[2], names)
    if hint:
        return f"{place} is unknown{hint}"
    if place.startswith("trainer."):
        of = "TRL's SFTConfig" if "packing" in names else "transformers' TrainingArguments"
        return f"{place} is unknown; the names are those of {of}."
    return f"{place} is unknown; choose one of {', '.join(sorted(names))}."


def _explain(found: Any, kind: str) -> str:
    """Put one of pydantic's errors in words."""
    *outer, name = [str(part) for part in found["loc"]]
    place = ".".join([*outer, name])
    model: type[BaseModel] = SECTIONS_OF[kind][outer[0]] if outer else RECIPES[kind]
    value = found["input"]
    match found["type"]:
        case "extra_forbidden":
            return _unknown(place, model.model_fields)
        case "missing":
            return f"{place} is missing; {MISSING[outer[0] if outer else name]}."
        case "model_type":
            return f"{place} is {_shown(value)}, but must be a mapping, or one name."
        case "literal_error":
            choices = typing.get_args(model.model_fields[name].annotation)
            near = _did_you_mean(str(value), choices)
            return f"{place} is {_shown(value)}, but must be {found['ctx']['expected']}{near or '.'}"
        case "value_error":
            return f"{place} is {_shown(value)}, but must be {found['ctx']['error']}."
        case "string_type":
            return f"{place} is {_shown(value)}, but must be a text; put it in quotes."
    message = found["msg"].replace("dictionary", "mapping").replace("Input should", "it should")
    message = message.replace("String should", "it should")
    return f"{place} is {_shown(value)}; {message}."


# --- The trainer's arguments --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainerDefault:
    """A default of ours for a field of SFTConfig.

    Attributes:
        cpu: Value on a CPU.
        gpu: Value on any other device.
        reason: Why it is not TRL's.
    """

    cpu: Any
    gpu: Any
    reason: str


def _default(value: Any, reason: str) -> TrainerDefault:
    return TrainerDefault(value, value, reason)


TRAINER_DEFAULTS: dict[str, TrainerDefault] = {
    "learning_rate": _default(2e-4, "adapters want ten times the rate of full fine-tuning"),
    "lr_scheduler_type": _default("cosine", "ends at zero, so the last steps do not add noise"),
    "warmup_steps": _default(0.03, "a fraction of all steps: Adam's first steps have no history"),
    "num_train_epochs": _default(1, "what small data sets need is for the held-out loss to say"),
    "per_device_train_batch_size": _default(8, "TRL's own, written out because runs are compared by it"),
    "max_length": _default(1024, "TRL's own, written out because examples are cut by it"),
    "bf16": TrainerDefault(False, True, "TRL turns it on everywhere, and fails on a CPU"),
    "fp16": _default(False, "bf16 needs no loss scaling; who has an older GPU asks for it"),
    "use_cpu": TrainerDefault(True, False, "the device is chosen once, for the model and the trainer"),
    "activation_checkpointing": TrainerDefault(False, True, "saves GPU memory for a third more time"),
    "dataloader_pin_memory": TrainerDefault(False, True, "pinning helps copies to a GPU, and warns without"),
    "logging_steps": _default(10, "1 where a run is so short that ten would leave no curve"),
    "save_strategy": _default("steps", "an interrupted run goes on from the last checkpoint"),
    "save_steps": _default(50, "a killed run loses minutes, not hours"),
    "save_total_limit": _default(2, "the newest may be cut off by a full disk; the one before is whole"),
    "eval_strategy": _default("no", "the run evaluates before and after by itself"),
    "report_to": _default("none", "nothing leaves the machine unasked"),
    "disable_tqdm": _default(True, "the run prints its own progress"),
}

# Those that a kind has otherwise: few pictures are seen often, and the paper's runs did not decay the rate.
TRAINER_DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "image": {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "per_device_train_batch_size": 1,
        "max_steps": 500,
    }
}

FEW_STEPS = 200  # below, every step is logged

# transformers 5.23 renamed these; whichever is given, the one that this version has is set.
CHECKPOINTING = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def resolve_trainer_arguments(recipe: Recipe, device: str, steps: int | None = None) -> dict[str, Any]:
    """Put our defaults under the recipe's ``trainer`` section.

    Args:
        recipe: A checked recipe.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:0"``, ...
        steps: How many optimiser steps the run will take, if known.

    Returns:
        Arguments of the trainer's configuration, all but ``output_dir``.
    """
    given = dict(recipe.trainer)
    on_cpu = device.startswith("cpu") or bool(given.get("use_cpu"))
    arguments = {name: d.cpu if on_cpu else d.gpu for name, d in TRAINER_DEFAULTS.items()}
    own = TRAINER_DEFAULTS_OF.get(recipe.task.kind, {})
    # Who counts epochs wants no other number of steps.
    arguments |= {n: v for n, v in own.items() if n != "max_steps" or "num_train_epochs" not in given}
    arguments |= {"seed": recipe.seed, "data_seed": recipe.seed}
    arguments["bf16"] = arguments["bf16"] and not given.get("fp16") and _has_bf16(device)
    planned = steps if steps is not None else given.get("max_steps", arguments.get("max_steps", -1))
    if 0 < planned <= FEW_STEPS:
        arguments["logging_steps"] = 1
    # Both to the new name, so that the user's replaces ours; then to the one that this version has.
    arguments |= {CHECKPOINTING.get(name, name): value for name, value in given.items()}
    known = _trainer_fields(recipe.task.kind)
    older = {new: old for old, new in CHECKPOINTING.items() if new not in known}
    named = {older.get(name, name): value for name, value in arguments.items()}
    return {name: value for name, value in named.items() if name in known}


def _has_bf16(device: str) -> bool:
    if not device.startswith("cuda"):
        return False
    import torch

    return bool(torch.cuda.is_bf16_supported())


def build_trainer_config(
    recipe: Recipe, device: str, output_dir: str | Path, steps: int | None = None, **changes: Any
) -> Any:
    """Make the trainer's configuration: TRL's, or transformers' own for pictures.

    Args:
        recipe: A checked recipe.
        device: Where the run trains.
        output_dir: Where checkpoints go.
        steps: How many optimiser steps the run will take, if known.
        **changes: Fields that the run decides, over all others.

    Returns:
        The configuration.

    Raises:
        RecipeError: With the configuration's own complaint, for values that do not go together or not on this device.
    """
    arguments = resolve_trainer_arguments(recipe, device, steps) | changes
    try:
        return _trainer_config(recipe.task.kind)(output_dir=str(output_dir), **arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"trainer: {' '.join(str(error).split())}") from error
