"""The recipe: what a run does, typed and checked before anything heavy is loaded.

A recipe is a YAML file, ``section.key=value`` overrides, or both::

    model: smollm2-135m-instruct
    data: requests.jsonl
    adapter: {r: 16, mixer: orthogonal}
    trainer: {learning_rate: 1e-3, max_steps: 200}

Sections ``adapter`` and ``trainer`` belong to other libraries: their keys are the fields of ``MoSLoRAConfig``
and of TRL's ``SFTConfig``, looked up where they are defined. Everything wrong is reported at once.
"""

from __future__ import annotations

import re
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    Field,
    field_validator,
    model_validator,
)

from moslora.recipe.data_section import DataSection, Name, Section
from moslora.recipe.yaml_core import CORE_SCHEMA, Dumper, Loader

__all__ = [
    "ADAPTER_DEFAULTS",
    "SHIPPED",
    "DataSection",
    "EvaluationSection",
    "MixSection",
    "ModelSection",
    "OutputSection",
    "ParallelSection",
    "Recipe",
    "TaskSection",
]


# --- The sections of a recipe ------------------------------------------------------------------------------


class TaskSection(Section):
    """What is learned, and how it is judged."""

    kind: Literal["text"] = "text"
    metric: Literal["none", "json", "text"] = "none"
    generate_examples: int = Field(default=100, ge=0)
    max_new_tokens: int = Field(default=128, ge=1)
    samples: int = Field(default=6, ge=0)


class ModelSection(Section):
    """The base model: a packaged name, a hub id, a folder or a GGUF file."""

    name: Name
    revision: Name | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    attn_implementation: Name | None = None
    tokenizer: Name | None = None
    quantization: Literal["none", "nf4"] = "none"
    device_map: Literal["none", "auto"] = "none"


class VisionTaskSection(TaskSection):
    """What is learned from pictures, and how it is judged."""

    kind: Literal["vision"] = "vision"  # type: ignore[assignment]
    metric: Literal["none", "json", "text", "short", "choice"] = "none"  # type: ignore[assignment]
    shuffle_images: bool = True


class VisionDataSection(DataSection):
    """Examples with pictures: LLaVA's JSON, or messages beside a list of images."""

    train: Name
    heldout: Name | None = None
    train_on: Literal["completions", "last", "all"] = "completions"
    cache: Literal["auto"] = "auto"

    images: Name | None = None
    bad_images: Literal["refuse", "skip"] = "refuse"
    max_pixels: int = Field(default=50_000_000, ge=1)
    square: Literal["none", "pad", "crop"] = "none"


# The keys of ``LOSSES``.
LossName = Literal[
    "dpo", "ipo", "hinge", "robust", "exo", "nca", "bco", "sppo", "aot", "aot-unpaired", "apo-zero", "apo-down",
    "discopop", "dpo-norm", "kto", "apo-zero-unpaired", "orpo", "cpo", "simpo",
]  # fmt: skip


class PreferenceTaskSection(TaskSection):
    """How preferences are learned, and how that is judged."""

    kind: Literal["preference"] = "preference"  # type: ignore[assignment]
    loss: LossName = "dpo"
    beta: float | None = Field(default=None, gt=0)
    reference: Literal["auto", "base", "start", "none"] = "auto"


class PreferenceDataSection(DataSection):
    """Pairs of answers, or answers with labels."""

    train: Name
    heldout: Name | None = None
    format: Literal["auto", "preference", "labeled"] = "auto"  # type: ignore[assignment]
    train_on: Literal["completions"] = "completions"
    cache: Literal["auto"] = "auto"


ClassificationMetric = Literal[
    "auto",
    "none",
    "accuracy",
    "exact_match",
    "f1",
    "f1_macro",
    "f1_micro",
    "entity_f1",
    "mcc",
    "pearson",
    "spearman",
]


class ClassificationTaskSection(Section):
    """Which kind of labels is learned, and what models are judged by."""

    kind: Literal["classification"] = "classification"
    problem: Literal["auto", "single-label", "multi-label", "regression", "tokens"] = "auto"
    metric: ClassificationMetric = "auto"
    positive: Name | int | None = None
    head: Literal["auto", "new"] = "auto"
    samples: int = Field(default=6, ge=0)


class ClassificationDataSection(DataSection):
    """Texts, pairs of texts or words, and their labels."""

    train: Name
    heldout: Name | None = None
    reasoning: Literal["keep"] = "keep"
    system_turn: Literal["keep"] = "keep"
    format: Literal["auto"] = "auto"
    template: Literal["auto"] = "auto"
    train_on: Literal["completions"] = "completions"
    cache: Literal["auto"] = "auto"
    labels: list[Name | int] | None = Field(default=None, min_length=2)
    columns: dict[Name, Name] | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _in_words(cls, labels: Any) -> Any:
        """Take true and false for the texts that rows' true and false are read as."""
        is_list = isinstance(labels, list)
        return [str(one).lower() if isinstance(one, bool) else one for one in labels] if is_list else labels


class RewardTaskSection(Section):
    """How a reward model is judged: by which answer of a pair has the higher reward."""

    kind: Literal["reward"] = "reward"
    metric: Literal["accuracy", "none"] = "accuracy"
    head: Literal["auto", "new"] = "auto"
    samples: int = Field(default=6, ge=0)


class RewardDataSection(DataSection):
    """Pairs of answers, one of them preferred."""

    train: Name
    heldout: Name | None = None
    format: Literal["auto"] = "auto"
    train_on: Literal["completions"] = "completions"
    cache: Literal["auto"] = "auto"


# A scope's own mixer; none is no mixer, as in LoRA.
MixerName = Literal["none", "kaiming", "orthogonal", "gaussian", "identity", "two-subspace"]


class _Scopes(Section):
    """Parts of a model; settings of a part's adapter require that the part is adapted."""

    @model_validator(mode="after")
    def _all_used(self) -> Self:
        for name in type(self).model_fields:
            part, _, what = name.rpartition("_")
            if (
                what in ("r", "alpha", "mixer")
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
    language_mixer: MixerName | None = None
    vision_mixer: MixerName | None = None
    projector_mixer: MixerName | None = None


class ImageModelSection(Section):
    """The base pipeline: a diffusers folder or a hub id."""

    name: Name
    revision: Name | None = None
    variant: Name | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class ImageTaskSection(Section):
    """How a denoiser is trained on pictures, and what is shown of it."""

    kind: Literal["image"] = "image"
    prompts: list[Name] = Field(default=[])
    prompts_file: Name | None = None
    published_prompts: Literal["none", "object", "live", "authors"] = "none"
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


class SubjectSection(Section):
    """A further subject of the same run: its pictures and words."""

    path: Name
    prompt: Name | None = None
    token: Name | None = None
    class_name: Name | None = None


class ImageDataSection(Section):
    """Folders of pictures, and how they become what a denoiser sees."""

    train: Name
    heldout: Name | None = None
    prompt: Name | None = None
    token: Name | None = None
    class_name: Name | None = None
    subjects: list[SubjectSection] = Field(default=[])
    resolution: int | None = Field(default=None, ge=8)
    crop: Literal["center", "random"] = "center"
    crops: int = Field(default=4, ge=1)
    flip: bool = False
    buckets: bool = False
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)
    class_images: Name | None = None
    class_prompt: Name | None = None
    class_count: int = Field(default=100, ge=1)
    bad_images: Literal["refuse", "skip"] = "refuse"
    max_pixels: int = Field(default=50_000_000, ge=1)
    limit: int | None = Field(default=None, ge=1)
    ignore: list[Name] | None = None


class ImageScopesSection(_Scopes):
    """Which parts of a pipeline are adapted beside its denoiser."""

    text_encoders: Literal["adapter", "frozen"] = "frozen"
    text_encoders_r: int | None = Field(default=None, ge=1)
    text_encoders_alpha: float | None = Field(default=None, gt=0)


# The text that comes with the package; any other entry of ``evaluation.also`` is a file or hub id.
SHIPPED = "general"


class EvaluationSection(Section):
    """What is measured beside the task's own held-out data: what tuning cost on text that it is not about."""

    also: list[Name] = Field(default=[SHIPPED])

    @field_validator("also")
    @classmethod
    def _once(cls, also: list[str]) -> list[str]:
        if twice := next((name for name in also if also.count(name) > 1), None):
            raise ValueError(f"a list that names {twice} once")
        return also


class OutputSection(Section):
    """Where the run directory goes."""

    dir: Name = "runs"
    name: Name | None = None

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str | None) -> str | None:
        if name is not None and (name in (".", "..") or re.search(r'[\x00-\x1f/\\<>:"|?*]', name)):
            raise ValueError("the name of a folder without a path; set its parent as output.dir")
        return name


class ParallelSection(Section):
    """How several processes share the model. See ``recipe/parallel.py``."""

    kind: Literal["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"] = "auto"


class MixSection(Section):
    """Trained adapters whose common mixer is learned, their factors frozen. See ``moslora mix``."""

    adapters: list[Name] = Field(min_length=1)
    weights: list[float] | None = None


class Recipe(Section):
    """A whole recipe. Make one with ``load_recipe``, which also checks ``adapter`` and ``trainer``.

    Example:
        >>> recipe = load_recipe(["model=org/base", "data=org/examples", "adapter.r=8"])
        >>> recipe.adapter["r"], recipe.data.train_on
        (8, 'completions')
    """

    task: TaskSection = TaskSection()
    model: ModelSection
    data: DataSection
    adapter: dict[str, Any] = Field(default={})
    # In a file it is ``adapter.start_from``; the section proper holds the arguments of MoSLoRAConfig alone.
    start_from: Name | None = None
    mix: MixSection | None = None
    trainer: dict[str, Any] = Field(default={})
    parallel: ParallelSection = ParallelSection()
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection = OutputSection()
    seed: int = Field(default=0, ge=0, lt=2**32)

    def sections(self, exclude_none: bool = False) -> dict[str, Any]:
        """Return the recipe as a file has it, section by section.

        Args:
            exclude_none: Whether keys without a value are left out.
        """
        values = self.model_dump(exclude_none=exclude_none)
        start = values.pop("start_from", None)
        if start is not None:
            values["adapter"] = {"start_from": start, **values["adapter"]}
        if self.parallel == ParallelSection():
            del values[
                "parallel"
            ]  # one process needs none, and its recipe can be read by versions that know none
        return values

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every default written out; reading it back gives an equal recipe."""
        return yaml.dump(self.sections(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


class VisionRecipe(Recipe):
    """A recipe of ``task: vision``."""

    task: VisionTaskSection = VisionTaskSection()
    data: VisionDataSection
    scopes: ScopesSection = ScopesSection()


class PreferenceRecipe(Recipe):
    """A recipe of ``task: preference``."""

    task: PreferenceTaskSection = PreferenceTaskSection()
    data: PreferenceDataSection


class ClassificationRecipe(Recipe):
    """A recipe of ``task: classification``."""

    task: ClassificationTaskSection = ClassificationTaskSection()  # type: ignore[assignment]
    data: ClassificationDataSection
    evaluation: EvaluationSection = EvaluationSection(also=[])


class RewardRecipe(Recipe):
    """A recipe of ``task: reward``."""

    task: RewardTaskSection = RewardTaskSection()  # type: ignore[assignment]
    data: RewardDataSection
    evaluation: EvaluationSection = EvaluationSection(also=[])


class ImageRecipe(Recipe):
    """A recipe of ``task: image``."""

    task: ImageTaskSection = ImageTaskSection()  # type: ignore[assignment]
    model: ImageModelSection  # type: ignore[assignment]
    data: ImageDataSection  # type: ignore[assignment]
    evaluation: EvaluationSection = EvaluationSection(also=[])
    scopes: ImageScopesSection = ImageScopesSection()


# What a recipe may contain, by the kind of its task.
RECIPES: dict[str, type[Recipe]] = {
    "text": Recipe,
    "vision": VisionRecipe,
    "image": ImageRecipe,
    "preference": PreferenceRecipe,
    "classification": ClassificationRecipe,
    "reward": RewardRecipe,
}

ADAPTER_DEFAULTS: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "mixer": "orthogonal",
}


for _class in (Loader, Dumper):
    _class.yaml_implicit_resolvers = {}  # PyYAML's own, which are YAML 1.1
    for _tag, _pattern, _first in CORE_SCHEMA:
        _letters = [*_first, ""] if _tag == "null" else [*_first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _letters)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_core_int)
Dumper.add_representer(str, Dumper.represent_text)


SECTIONS: dict[str, type[BaseModel]] = {
    "task": TaskSection,
    "model": ModelSection,
    "data": DataSection,
    "mix": MixSection,
    "parallel": ParallelSection,
    "evaluation": EvaluationSection,
    "output": OutputSection,
    "scopes": ScopesSection,
}
# Those of each kind.
SECTIONS_OF: dict[str, dict[str, type[BaseModel]]] = {
    "text": SECTIONS,
    "vision": {**SECTIONS, "task": VisionTaskSection, "data": VisionDataSection},
    "preference": {**SECTIONS, "task": PreferenceTaskSection, "data": PreferenceDataSection},
    "classification": {**SECTIONS, "task": ClassificationTaskSection, "data": ClassificationDataSection},
    "reward": {**SECTIONS, "task": RewardTaskSection, "data": RewardDataSection},
    "image": {
        **SECTIONS,
        "task": ImageTaskSection,
        "model": ImageModelSection,
        "data": ImageDataSection,
        "scopes": ImageScopesSection,
    },
}
