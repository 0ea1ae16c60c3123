"""Text-to-image models: a subject learned from a few pictures (DreamBooth, arXiv:2208.12242), or a style from captions.

The base is a diffusers pipeline. Its denoiser is adapted, its text encoders too where the recipe wants it. Latents, and
words where their encoders are frozen, are encoded once; what a step sees of them follows from the recipe's seed.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.distributed import launched
from moslora.errors import ModelError
from moslora.files import sha256
from moslora.models.fingerprint import HASH_LIMIT, header_sha256, hub_commit
from moslora.models.loading import call_loader, check_loaded, default_device, quiet_transformers
from moslora.models.names import HUB_ID, ModelSource, not_found_message, read_json
from moslora.recipe.schema import build_trainer_config, resolve_trainer_arguments
from moslora.tasks.image.fidelity import SCORES, Judge, about, find_judge, judge_pictures, open_made
from moslora.tasks.image.folders import (
    SUFFIXES,
    Folder,
    Picture,
    cut,
    fill,
    is_square,
    places,
    plan_crops,
    read_folder,
)
from moslora.tasks.image.published_prompts import PUBLISHED
from moslora.tasks.task import Count, Evaluation, Shown, Task
from moslora.tasks.vision.task import open_image

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback

    from moslora.tasks.image.denoising import Draw, Shot

__all__ = ["ImageTask", "find_pipeline"]

INDEX = "model_index.json"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # of no use to training
CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
LISTED = re.compile(r"^(['\"])(.*)\1\.format\(unique_token, class_token\),?$")
GENERATED = "generated.json"  # beside the class's pictures: which of them the base made, and from what
BATCH = 4  # draws whose loss is measured at once
PROBES = 2  # pictures whose noised latents the proof compares
PROBE_LEVELS = 3  # of noise, for each
WEIGHTS_FILE = "adapter_model.safetensors"  # of a checkpoint; transformers' name


def find_pipeline(name: str, revision: str | None = None) -> ModelSource:
    """Find out what a pipeline's name means. Looks at files only.

    Args:
        name: A diffusers folder, or a hub id ``org/name``.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The pipeline's place.

    Raises:
        ModelError: If there is no such thing, or it is no pipeline.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for a user that does not exist
    if os.path.isdir(path):  # noqa: PTH112 - Path's raises for a name that is too long
        if not (path / INDEX).is_file():
            inside = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"{path} is no diffusers pipeline: it has no {INDEX} (found: {inside}). A single checkpoint file is "
                "made one with StableDiffusionXLPipeline.from_single_file(…).save_pretrained(…)."
            )
        if revision is not None:
            raise ModelError(
                f"model.revision={revision!r} says nothing about {name}: only hub ids have revisions."
            )
        return ModelSource(name, "folder", str(path.absolute()))
    if path.is_file():
        raise ModelError(
            f"{name} is a file. Make it a folder first: StableDiffusionXLPipeline.from_single_file(…)"
            ".save_pretrained(…), or the class of its family."
        )
    if HUB_ID.fullmatch(name):
        return ModelSource(name, "hub", name, revision=revision)
    raise ModelError(not_found_message(name, path))


class ImageTask(Task):
    """Fine-tune the denoiser of a diffusion pipeline on pictures."""

    reader = "diffusers"

    # --- What comes before any weight ---

    def count(self) -> list[Count]:
        """Count parameters of the pipeline's models, from their configurations alone."""
        from peft import get_peft_model

        self._find()
        self._open()
        configs = dict.fromkeys(self.family.clips, self._text_config) if self._with_text else {}
        found = []
        for name in (self.family.denoiser, "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
            if not all(self.index.get(name) or [None]):
                continue
            model = self._skeleton(name)
            base, trained = sum(p.numel() for p in model.parameters()), 0
            if name == self.family.denoiser:
                self._chosen(model)  # whose refusals say more than PEFT's
            if name == self.family.denoiser or name in configs:
                config: Any = configs[name]() if name in configs else self.adapter_config(model)
                config.init_lora_weights = True  # where factors start changes no count, and may want weights
                adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
                trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            found.append(Count(name, base, trained))
        return found

    def _find(self) -> None:
        """Find the base."""
        for package in ("diffusers", "PIL"):
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"task=image needs {package}. Run: pip install 'moslora[image]'")
        self.source = find_pipeline(self.recipe.model.name, self.recipe.model.revision)

    def read(self) -> None:
        """Find the base, and read all pictures and their words."""
        self._find()
        recipe: Any = self.recipe
        data, task = recipe.data, recipe.task
        self.judges: list[Judge] = []
        self.filled: set[str] = set()  # places that prompts and captions have
        if (data.class_images is None) != (data.class_prompt is None):
            raise ValueError(
                "Prior preservation needs both data.class_images, a folder, and data.class_prompt; set both or none."
            )
        self.train_folder = self._read(data.train, data.prompt, limit=data.limit)
        self.heldout_folder = self._read(data.heldout, data.prompt) if data.heldout is not None else None
        self.class_folder, self.missing = self._read_class()
        templates = [*task.prompts, *PUBLISHED.get(task.published_prompts, ()), *self._listed_prompts()]
        self.prompts = list(dict.fromkeys(map(self._fill, templates)))
        named = {key: getattr(task, key) for key in ("dino_model", "clip_model")}
        self.judges = [find_judge(key, name) for key, name in named.items() if name is not None]
        self._refuse_idle_keys()
        for name in ("token", "class_name"):
            value = getattr(data, name)
            if value is not None and name not in self.filled and not (name == "token" and self.judges):
                self.display.warn(
                    f"data.{name}={value} fills no place: no prompt or caption has {{}} or {{{name}}} for it."
                )
        if self.heldout_folder is not None:
            seen = {p.sha256 for p in self.train_folder.pictures}
            both = sum(p.sha256 in seen for p in self.heldout_folder.pictures)
            if both:
                self.display.warn(
                    f"{both} of {len(self.heldout_folder.pictures)} held-out pictures are also trained on, so the "
                    "held-out loss flatters the model. Take them out of one of the two folders."
                )

    def _refuse_idle_keys(self) -> None:
        """Refuse settings that would do nothing beside the others; whoever made them expects something."""
        recipe: Any = self.recipe
        task, data, trainer = recipe.task, recipe.data, recipe.trainer
        plain = {name: field.default for name, field in type(task).model_fields.items()}
        faults = []
        if data.class_images is None:
            if task.prior_weight != 1.0:
                faults.append(
                    "task.prior_weight weighs the class's pictures; set data.class_prompt and .class_images."
                )
            if data.class_count != type(data).model_fields["class_count"].default:
                faults.append(
                    "data.class_count counts the class's pictures; set data.class_prompt and .class_images."
                )
        if data.crop == "center" and data.crops != type(data).model_fields["crops"].default:
            faults.append(
                f"data.crops={data.crops} counts random squares, and of data.crop=center there is one; set "
                "data.crop=random."
            )
        if not self.prompts:
            faults += [
                f"task.{key} is about pictures of prompts, and there are none: set task.prompts, "
                "task.published_prompts or task.prompts_file."
                for key in ("pictures_every", "dino_model", "clip_model")
                if getattr(task, key) is not None
            ]
            made = (
                ("inference_steps", "guidance_scale", "negative_prompt") if data.class_images is None else ()
            )
            idle = [k for k in ("pictures_per_prompt", *made) if getattr(task, k) != plain[k]]
            if idle:
                self.display.warn(
                    f"task.{', .'.join(idle)}: no pictures will be made, as there are no prompts."
                )
        if task.negative_prompt is not None and task.guidance_scale is not None and task.guidance_scale <= 1:
            faults.append(
                f"task.negative_prompt does nothing at task.guidance_scale={task.guidance_scale:g}, which is no "
                "guidance; set one above 1."
            )
        if faults:
            raise ValueError("\n".join(faults))
        if trainer.get("max_steps", -1) > 0 and trainer.get("num_train_epochs", 1) != 1:
            self.display.warn(
                f"trainer.max_steps={trainer['max_steps']} decides; trainer.num_train_epochs is not looked at."
            )

    def _fill(self, template: str) -> str:
        data: Any = self.recipe.data
        self.filled |= places(template)
        return fill(template, data.token, data.class_name)

    def _listed_prompts(self) -> list[str]:
        place = self.recipe.task.prompts_file  # type: ignore[attr-defined]
        if place is None:
            return []
        path = Path(place)
        if not path.is_file():
            raise ValueError(f"task.prompts_file: {path} does not exist.")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if any(line.startswith("prompt_list") for line in lines):
            raise ValueError(
                f"task.prompts_file: {path} is DreamBooth's whole published file, with classes and two lists. Set "
                "task.published_prompts=object or =live instead, or keep one list's prompts only."
            )
        # A line of DreamBooth's published list is Python: 'a {0} {1} …'.format(unique_token, class_token),
        found = [LISTED.sub(r"\2", line) for line in lines if line]
        if not found:
            raise ValueError(f"task.prompts_file: {path} is empty; write one prompt a line.")
        return found

    def _read(self, folder: str, prompt: str | None, limit: int | None = None) -> Folder:
        data: Any = self.recipe.data
        found = read_folder(
            Path(folder),
            None if prompt is None else self._fill(prompt),
            data.max_pixels,
            data.bad_images == "skip",
            limit=limit,
            name_words=self._fill,
            checkpoint=self.checkpoint,
        )
        if found.skipped:
            some = "; ".join(found.skipped[:5])
            more = f"; and {len(found.skipped) - 5} more" if len(found.skipped) > 5 else ""
            self.display.warn(f"{folder}: skipped {len(found.skipped)} pictures: {some}{more}.")
        if found.unread:
            self.display.warn(
                f"{folder} has {found.unread} captions, which are not read because data.prompt is set."
            )
        return found

    def _read_class(self) -> tuple[Folder | None, list[int]]:
        """Read the class's pictures, and tell which are still to be made."""
        data: Any = self.recipe.data
        if data.class_images is None:
            return None, []
        folder = Path(data.class_images)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"data.class_images: {folder} is a file; name a folder.")
        record = self._generated(folder)
        given = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
        own = [p for p in given if p.name not in record["files"] and p.name != GENERATED]
        there = None
        if own or record["files"]:
            there = self._read(str(folder), data.class_prompt, limit=data.class_count)
            changed = [
                p.path.name for p in there.pictures if record["files"].get(p.path.name, p.sha256) != p.sha256
            ]
            if changed:
                raise ValueError(
                    f"{folder / changed[0]} is not what was generated; remove it, to make it again."
                )
        count = len(there.pictures) if there else 0
        if sum(p.suffix.lower() in SUFFIXES for p in given) > data.class_count:
            self.display.warn(
                f"{folder} has more pictures than data.class_count={data.class_count}; the first by name are used."
            )
        numbers = [n for n in range(data.class_count) if self._name(n) not in record["files"]]
        return there, numbers[: max(0, data.class_count - count)]

    @staticmethod
    def _name(number: int) -> str:
        return f"generated-{number:05d}.png"

    def _generated(self, folder: Path) -> dict[str, Any]:
        """Return which pictures of a folder a base made; refuse those of another base or prompt."""
        about = {"prompt": self._fill(self.recipe.data.class_prompt), "base": self.source.name}  # type: ignore[attr-defined]
        path = folder / GENERATED
        if not path.is_file():
            return {**about, "files": {}}
        found = read_json(path)
        for key, value in about.items():
            if found.get(key) != value:
                raise ValueError(
                    f"The pictures in {folder} were generated with the {key} {found.get(key)!r}, not {value!r}; name "
                    "another folder in data.class_images."
                )
        return {**about, "files": {n: h for n, h in found["files"].items() if (folder / n).is_file()}}

    def _open(self) -> None:
        """Read what kind of pipeline it is."""
        from moslora.tasks.image.denoising import FAMILIES

        self.folder = self._configs()
        self.index = read_json(self.folder / INDEX)
        kind = str(self.index.get("_class_name"))
        if kind not in FAMILIES:
            raise ValueError(
                f"{self.source.name} is a {kind}; task=image trains {', '.join(FAMILIES)}. Others take other inputs, "
                "and would be trained wrongly."
            )
        self.auto_class, self.family = kind, FAMILIES[kind]

    def prepare(self) -> None:
        """Read the pipeline's configuration, and tell what will be trained on."""
        recipe: Any = self.recipe
        self._open()
        if self.family.is_flow:
            for key, value in (
                ("snr_gamma", recipe.task.snr_gamma),
                ("noise_offset", recipe.task.noise_offset),
            ):
                if value:
                    raise ValueError(f"task.{key} is for U-Nets; {self.family.title} is of flow matching.")
        self._refuse_keys_of_other_families()
        self.resolution = self._resolution()
        small = [p.path.name for p in self.train_folder.pictures if min(p.width, p.height) < self.resolution]
        if small:
            self.display.warn(
                f"{len(small)} pictures are smaller than data.resolution={self.resolution} and are enlarged, as "
                f"{small[0]}."
            )
        if recipe.data.crop == "random" and all(
            is_square(p, self.resolution) for p in self.train_folder.pictures
        ):
            self.display.warn(
                "data.crop=random does nothing: every picture is a square, and is learned whole."
            )
        self._show()

    def _refuse_keys_of_other_families(self) -> None:
        """Refuse settings that this pipeline would pass over in silence."""
        task: Any = self.recipe.task
        denoiser = read_json(self.folder / self.family.denoiser / "config.json")
        name = self.source.name
        if self.family.title == "FLUX":
            if task.negative_prompt is not None:
                raise ValueError("task.negative_prompt: FLUX, being distilled, takes none.")
            if task.guidance_scale is not None and not denoiser.get("guidance_embeds"):
                raise ValueError(f"task.guidance_scale: {name} is distilled to do without, and takes none.")
        if denoiser.get("time_cond_proj_dim") and task.negative_prompt is not None:
            raise ValueError(f"task.negative_prompt: {name}, being distilled, takes none.")
        if self.family.t5 is None and task.max_sequence_length is not None:
            raise ValueError(f"task.max_sequence_length is T5's, and {self.family.title} has none.")

    def _configs(self) -> Path:
        """Return a folder with the pipeline's configurations."""
        if self.source.kind == "folder":
            return Path(self.source.path)
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.json", "*.txt", "*.model"]
            return Path(
                snapshot_download(self.source.path, revision=self.source.revision, allow_patterns=patterns)
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{self.source.name} cannot be read: {reason} Is it the right id, and is there a network?"
            ) from error

    def _resolution(self) -> int:
        recipe: Any = self.recipe
        wanted: int | None = recipe.data.resolution
        vae = read_json(self.folder / "vae" / "config.json")
        denoiser = read_json(self.folder / self.family.denoiser / "config.json")
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        if wanted is None:
            size = denoiser.get("sample_size") or 128
            wanted = int(size if isinstance(size, int) else size[0]) * factor
        step = factor * {"FLUX": 2, "SD3": int(denoiser.get("patch_size") or 1)}.get(self.family.title, 1)
        if wanted % step:
            raise ValueError(
                f"data.resolution={wanted} is no multiple of {step}, which {self.source.name} needs."
            )
        return wanted

    def _show(self) -> None:
        """Say what is trained on."""
        recipe: Any = self.recipe
        data, display, family = recipe.data, self.display, self.family
        total, modules = self._size()
        display.say(
            f"{self.source.name}: {family.title}, its {family.denoiser} has {total:,} parameters; {modules} of its "
            "modules are adapted"
            + (f", and its text encoders ({', '.join(family.clips)})." if self._with_text else ".")
        )
        held = f", held out: {len(self.heldout_folder.pictures)}" if self.heldout_folder else ""
        shots = sum(len(self._crops(p)) for p in self.train_folder.pictures)
        display.say(
            f"Pictures: {len(self.train_folder.pictures)}{held}. They become {shots} squares of {self.resolution} × "
            f"{self.resolution} pixels ({data.crop} crop{', also mirrored' if data.flip else ''})."
        )
        first = self.train_folder.pictures[0]
        crop = self._crops(first)[0]
        display.say(
            f"One example: {first.path.name}, {first.width} × {first.height}, from {crop.left}, {crop.top}: "
            f"“{first.prompt}”"
        )
        if self.heldout_folder is None:
            display.say(
                "data.heldout names none, so the loss is measured on the training pictures, with other noise."
            )
        if data.class_images is not None:
            made = f"{len(self.missing)} will be generated" if self.missing else "all are there"
            display.say(
                f"Prior preservation: {data.class_count} pictures of “{self._fill(data.class_prompt)}” in "
                f"{data.class_images}; {made}. Their loss counts {recipe.task.prior_weight:g} times."
            )
        if self.prompts:
            display.say(self._say_of_pictures())
        else:
            display.say("task.prompts names none, so no pictures will be shown side by side.")

    def _say_of_pictures(self) -> str:
        """Say how many pictures will be made, for each takes as long as many training steps."""
        task: Any = self.recipe.task
        count = len(self.prompts) * task.pictures_per_prompt
        said = f"{count} pictures of {len(self.prompts)} prompts are made before training and after it"
        if task.pictures_every is None:
            return f"{said}."
        steps = range(task.pictures_every, self._steps(), task.pictures_every)
        if not steps:
            raise ValueError(
                f"task.pictures_every={task.pictures_every}, but training has {self._steps()} steps, after the last of "
                "which pictures are made anyway; set a smaller number, or null."
            )
        return f"{said}, and {count} more after each {task.pictures_every} steps: {(2 + len(steps)) * count} in all."

    def _steps(self) -> int:
        """Return how many optimiser steps will be taken."""
        arguments = resolve_trainer_arguments(self.recipe, self.device)
        if arguments.get("max_steps", -1) > 0:
            return int(arguments["max_steps"])
        rows = arguments["per_device_train_batch_size"] * arguments.get("gradient_accumulation_steps", 1)
        at_once = rows * launched()
        steps: float = len(self.train_folder.pictures) * arguments["num_train_epochs"] / at_once
        return max(1, round(steps))

    def _size(self) -> tuple[int, int]:
        """Return how many parameters the denoiser has, and how many of its modules are adapted."""
        skeleton = self._skeleton(self.family.denoiser)
        return sum(p.numel() for p in skeleton.parameters()), len(self._chosen(skeleton))

    def _skeleton(self, name: str) -> nn.Module:
        """Build a model of the pipeline without values, from its configuration."""
        from accelerate import init_empty_weights
        from diffusers import ConfigMixin

        kind = _class(self.index[name])
        with init_empty_weights():
            if issubclass(kind, ConfigMixin):
                model: nn.Module = kind.from_config(kind.load_config(self.folder / name))
            else:
                model = kind(kind.config_class.from_pretrained(self.folder / name))
        return model

    def _chosen(self, skeleton: nn.Module) -> list[str]:
        """Return which modules of the denoiser are adapted; refuse names that it does not have."""
        from peft.tuners.tuners_utils import check_target_module_exists
        from torch import nn

        config: Any = self.adapter_config(skeleton)
        leaves = [
            n for n, m in skeleton.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)
        ]
        if config.target_modules == "all-linear":
            chosen = [n for n, m in skeleton.named_modules() if isinstance(m, nn.Linear)]
        else:
            chosen = [name for name in leaves if check_target_module_exists(config, name)]
        if not chosen:
            ends = {
                n.split(".")[-1] if not n.split(".")[-1].isdigit() else ".".join(n.split(".")[-2:])
                for n in leaves
            }
            named = self.recipe.adapter["target_modules"]
            raise ValueError(
                f"adapter.target_modules={named!r} names no module of {self.source.name}'s "
                f"{self.family.denoiser}; it has {', '.join(sorted(ends))}."
            )
        self._refuse_unmatched_names(leaves, chosen)
        return chosen

    def _refuse_unmatched_names(self, leaves: Sequence[str], chosen: Sequence[str]) -> None:
        """Refuse names of modules that the denoiser does not have: PEFT would pass over them."""
        adapter = self.recipe.adapter
        faults = []
        for key in ("target_modules", "exclude_modules"):
            named = adapter.get(key)
            for name in named if isinstance(named, list | tuple | set) else ():
                if not any(leaf == name or leaf.endswith(f".{name}") for leaf in leaves):
                    faults.append(f"adapter.{key} has {name!r}, which is no module of {self.source.name}'s ")
        for key in ("rank_pattern", "alpha_pattern"):
            faults += [
                f"adapter.{key} has {name!r}, which is no adapted module of {self.source.name}'s "
                for name in adapter.get(key) or ()
                if not any(re.match(rf"(.*\.)?({name})$", module) for module in chosen)  # as PEFT does
            ]
        if faults:
            raise ValueError(
                "\n".join(f"{fault}{self.family.denoiser}; correct or remove it." for fault in faults)
            )

    @property
    def _with_text(self) -> bool:
        scopes: Any = self.recipe.scopes  # type: ignore[attr-defined]
        return bool(scopes.text_encoders == "adapter")

    @property
    def base(self) -> ModelSource:
        """The pipeline."""
        return self.source

    @property
    def place(self) -> str:
        """The pipeline's folder, of a hub id too: its revision is this one."""
        return str(self.folder)

    @property
    def device(self) -> str:
        """Where the run takes place."""
        return default_device()

    @property
    def exports(self) -> Mapping[str, tuple[str, str]]:
        """A diffusers file, and kohya's for U-Nets: of others diffusers rejects its own kohya names."""
        found = {"fold": ("lora/pytorch_lora_weights.safetensors", "diffusers")}
        return found if self.family.is_flow else {**found, "kohya": ("kohya.safetensors", "kohya")}

    def hashes(self) -> dict[str, Any]:
        """Return hashes of the pictures with their words, and of the pipeline."""
        recipe: Any = self.recipe
        data = {"train": self.train_folder.sha256}
        if self.heldout_folder is not None:
            data["heldout"] = self.heldout_folder.sha256
        if recipe.data.class_images is not None:
            # Generated ones are known by what they are made from; a changed one was refused already.
            files = self._generated(Path(recipe.data.class_images))["files"]
            there = self.class_folder.pictures if self.class_folder else ()
            data["class"] = "".join(p.sha256 for p in there if p.path.name not in files) or "generated"
        judges = {judge.key: judge.fingerprint() for judge in self.judges}
        return {"data": data, "base": self._fingerprint(), **({"judges": judges} if judges else {})}

    def _fingerprint(self) -> dict[str, Any]:
        about: dict[str, Any] = {"kind": self.source.kind, "name": self.source.name}
        if self.source.kind == "hub":
            return {**about, "method": "commit", "commit": hub_commit(self.source, INDEX)}
        weights = sorted(self.folder.glob("*/*.safetensors"))
        whole = sum(path.stat().st_size for path in weights) <= HASH_LIMIT
        files = {str(p.relative_to(self.folder)): sha256(p) if whole else header_sha256(p) for p in weights}
        configs = [self.folder / INDEX, *sorted(self.folder.glob("*/*.json"))]
        files |= {str(path.relative_to(self.folder)): sha256(path) for path in configs}
        return {**about, "method": "sha256" if whole else "sha256-of-headers", "files": files}

    # --- The model ---

    def load(self) -> nn.Module:
        """Load the pipeline, make the class's missing pictures, and encode everything that is encoded once."""
        import torch

        from moslora.tasks.image.denoising import Denoising, Flow, Noising

        recipe: Any = self.recipe
        task = recipe.task
        dtype = getattr(torch, self._dtype())
        pipeline = self._load_pipeline(dtype)
        density = task.timesteps
        if density == "auto":
            density = "logit-normal" if self.family.is_flow else "uniform"
        schedule = (
            Flow(pipeline.scheduler, density)
            if self.family.is_flow
            else Noising(pipeline.scheduler, density, task.snr_gamma)
        )
        self.model = Denoising(
            pipeline,
            self.family,
            schedule,
            dtype,
            task.noise_offset,
            task.prior_weight,
            task.max_sequence_length,
        )
        self.model.requires_grad_(False)
        self.model.eval()
        self._warn_of_cut_prompts(pipeline)
        self._make_class()
        self._encode()
        return self.model

    def _dtype(self) -> str:
        wanted = self.recipe.model.dtype
        if wanted != "auto":
            return wanted
        arguments = resolve_trainer_arguments(self.recipe, self.device)
        return "float16" if arguments.get("fp16") else "bfloat16" if arguments.get("bf16") else "float32"

    def _load_pipeline(self, dtype: Any) -> Any:
        """Load every model whole or not at all; the VAE in float32, for SDXL's overflows in float16."""
        import diffusers
        import torch

        if self.source.kind == "hub":
            options = {"revision": self.source.revision} if self.source.revision else {}
            options |= {"variant": self.variant} if self.variant else {}
            found = call_loader(
                self.source, diffusers.DiffusionPipeline.download, {**options, "use_safetensors": True}
            )
            self.folder = Path(found)
        self._check_variant()
        parts: dict[str, Any] = {}
        for name, value in self.index.items():
            if name.startswith("_"):
                continue
            if not isinstance(value, list):
                parts[name] = value  # a setting of the pipeline itself
            elif value[0] is None or name in UNUSED:
                parts[name] = None
            else:
                parts[name] = self._load_part(name, _class(value), torch.float32 if name == "vae" else dtype)
                self.checkpoint()
        if self.auto_class == "StableDiffusionPipeline":
            parts["requires_safety_checker"] = False
        with (
            quiet_transformers()
        ):  # which says of image processors, not used here, that they want torchvision
            pipeline = getattr(diffusers, self.auto_class)(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @property
    def variant(self) -> str | None:
        """The recipe's ``model.variant``."""
        found: str | None = self.recipe.model.variant  # type: ignore[attr-defined]
        return found

    def _check_variant(self) -> None:
        """Refuse a pipeline none of whose files are of the wanted variant; say which are there."""
        there = {
            name.rpartition(".")[2] if "." in name else ""
            for path in self.folder.glob("*/*.safetensors")
            for name in [re.sub(r"-\d{5}-of-\d{5}", "", path.stem)]
        }
        if there and (self.variant or "") not in there:
            named = ", ".join(sorted(name or "null" for name in there))
            raise ModelError(
                f"{self.source.name} has no weights of model.variant={self.variant or 'null'}; it has {named}."
            )

    def _files_of(self, name: str) -> dict[str, str]:
        """Return which variant of a part is loaded: the wanted one where the part has it, as diffusers does."""
        if self.variant is None:
            return {}
        if any((self.folder / name).glob(f"*.{self.variant}*.safetensors")):
            return {"variant": self.variant}
        self.display.say(f"{name} has no files of model.variant={self.variant}; its plain ones are loaded.")
        return {}

    def _load_part(self, name: str, kind: Any, dtype: Any) -> Any:
        from torch import nn

        place = ModelSource(f"{self.source.name}/{name}", "folder", str(self.folder / name))
        if not issubclass(kind, nn.Module):
            return call_loader(place, kind.from_pretrained, {})
        key = "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"
        options = {key: dtype, "use_safetensors": True, "output_loading_info": True, **self._files_of(name)}
        model, info = call_loader(place, kind.from_pretrained, options)
        check_loaded(place, info)
        return model.to(self.device).eval().requires_grad_(False)

    def _warn_of_cut_prompts(self, pipeline: Any) -> None:
        folders = [self.train_folder, self.heldout_folder, self.class_folder]
        prompts = dict.fromkeys([*(p.prompt for f in folders if f for p in f.pictures), *self.prompts])
        limit = pipeline.tokenizer.model_max_length
        for prompt in prompts:
            length = len(pipeline.tokenizer(prompt).input_ids)
            if length > limit:
                self.display.warn(
                    f"“{prompt[:60]}…” has {length} tokens; CLIP reads the first {limit} and no more."
                )
            tokenizer, tokens = self.family.t5 or ("", 0)
            tokens = self.recipe.task.max_sequence_length or tokens  # type: ignore[attr-defined]
            t5 = getattr(pipeline, tokenizer, None) if tokenizer else None
            if t5 is not None and len(t5(prompt).input_ids) > tokens:
                self.display.warn(
                    f"“{prompt[:60]}…” has more than {tokens} tokens of T5's, which reads no further; see "
                    "task.max_sequence_length."
                )

    def _make_class(self) -> None:
        """Generate the class's pictures that are missing, each written whole, and read all of them."""
        recipe: Any = self.recipe
        data = recipe.data
        # Another process of the run may have made them since.
        self.class_folder, self.missing = self._read_class()
        if data.class_images is None or not self.missing:
            return
        folder = Path(data.class_images)
        folder.mkdir(parents=True, exist_ok=True)
        record = self._generated(folder)
        with self.display.progress("Generating class pictures", len(self.missing)) as progress:
            for number in self.missing:
                content = self._make(record["prompt"], recipe.seed + 1_000_000 + number)
                path = folder / self._name(number)
                part = path.with_suffix(".part")
                part.write_bytes(content)
                part.replace(path)
                record["files"][path.name] = sha256(path)
                part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                part.replace(folder / GENERATED)
                progress.advance()
                self.checkpoint()
        self.class_folder, self.missing = self._read_class()

    def _crops(self, picture: Picture) -> list[Any]:
        data: Any = self.recipe.data
        return plan_crops(picture, self.resolution, data.crop, data.crops, data.flip, self.recipe.seed)

    def _encode(self) -> None:
        """Encode latents, and words where their encoders are frozen, once for the whole run."""
        pictures = [
            *self.train_folder.pictures,
            *(self.heldout_folder.pictures if self.heldout_folder else ()),
        ]
        prior = self.class_folder.pictures if self.class_folder else ()
        with self.display.progress("Encoding pictures", len(pictures) + len(prior)) as progress:
            for source, target in ((pictures, self.model.examples), (prior, self.model.prior)):
                for picture in source:
                    target.append((self._shots(picture), picture.prompt))
                    progress.advance()
                    self.checkpoint()
        if not self._with_text:
            self.model.remember([prompt for _, prompt in [*self.model.examples, *self.model.prior]])

    def _shots(self, picture: Picture) -> list[Shot]:
        import torch

        from moslora.tasks.image.denoising import Shot, encode

        data: Any = self.recipe.data
        image = open_image(picture.path, data.max_pixels)
        shots = []
        for crop in self._crops(picture):
            mean, std = encode(self.model.pipeline.vae, cut(image, self.resolution, crop))
            if not (mean.isfinite().all() and std.isfinite().all()):
                raise ValueError(f"{picture.path}: the VAE makes NaN or infinite values of it.")
            sizes = (picture.height, picture.width, crop.top, crop.left, self.resolution, self.resolution)
            shots.append(Shot(mean, std, torch.tensor(sizes, dtype=torch.float32)))
        return shots

    def adapter_config(self, model: nn.Module) -> PeftConfig:
        """Return the denoiser's adapter."""
        from moslora import MoSLoRAConfig

        return MoSLoRAConfig(**self.recipe.adapter)

    def _text_config(self) -> PeftConfig:
        from moslora import MoSLoRAConfig

        scopes: Any = self.recipe.scopes  # type: ignore[attr-defined]
        own: dict[str, Any] = {
            "target_modules": CLIP_TARGETS,
            "rank_pattern": {},
            "alpha_pattern": {},
            "exclude_modules": None,
        }
        if scopes.text_encoders_r is not None:
            own["r"] = scopes.text_encoders_r
        if scopes.text_encoders_alpha is not None:
            own["lora_alpha"] = scopes.text_encoders_alpha
        return MoSLoRAConfig(**{**self.recipe.adapter, **own})

    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig | None,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Make transformers' trainer on the model whose forward returns the denoising loss."""
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import Trainer, set_seed

        from moslora.tasks.image.denoising import seed_of

        if adapter is None:
            raise ValueError("task=image trains adapters.")
        denoising: Any = model
        configs = {self.family.denoiser: adapter}
        if self._with_text:
            configs |= {name: self._text_config() for name in self.family.clips}
        set_seed(self.recipe.trainer.get("seed", self.recipe.seed))
        denoising.adapt(configs)
        for config in configs.values():
            config.base_model_name_or_path = self.source.path
            config.revision = self.source.revision
        config = build_trainer_config(self.recipe, self.device, output_dir, remove_unused_columns=False)
        if config.n_gpu > 1:
            config._n_gpu = 1
            self.display.say(
                "Training on one GPU; `accelerate launch -m moslora` or torchrun starts a process for each."
            )
        if config.ddp_find_unused_parameters is None:
            # A text encoder's last layer gives a pipeline nothing; every other adapter acts on every picture.
            config.ddp_find_unused_parameters = self._with_text
        pictures = len(self.train_folder.pictures)
        at_once = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
        if config.max_steps <= 0:
            config.max_steps = max(1, round(pictures * config.num_train_epochs / at_once))
        seed = self.recipe.trainer.get("data_seed", self.recipe.seed)

        class Order(torch.utils.data.Dataset[dict[str, int]]):
            """Every picture once in random order, then again in another, to the end; with the seed of each."""

            def __len__(self) -> int:
                return int(config.max_steps * at_once)

            def __getitem__(self, at: int) -> dict[str, int]:
                turn, place = divmod(at, pictures)
                generator = torch.Generator().manual_seed(seed_of("order", seed, turn))
                picture = int(torch.randperm(pictures, generator=generator)[place])
                return {"picture": picture, "seed": seed_of("train", seed, at)}

        class DenoisingTrainer(Trainer):  # type: ignore[misc]
            """Takes examples in their order, and keeps trained parameters alone."""

            def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
                return torch.utils.data.SequentialSampler(self.train_dataset)

            def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
                folder = Path(output_dir or self.args.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                kept = {
                    n: p.detach().cpu().contiguous()
                    for n, p in denoising.named_parameters()
                    if p.requires_grad
                }
                save_file(kept, folder / WEIGHTS_FILE, metadata={"format": "pt"})

            def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
                kept = load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE)
                trained = {n: p for n, p in denoising.named_parameters() if p.requires_grad}
                if kept.keys() != trained.keys():
                    raise ValueError(f"{resume_from_checkpoint} is the checkpoint of another adapter.")
                with torch.no_grad():
                    for name, tensor in kept.items():
                        trained[name].copy_(tensor)

            def _load_best_model(self) -> None:
                self._load_from_checkpoint(self.state.best_model_checkpoint)

        measured = self._measured_examples()
        return DenoisingTrainer(
            model=denoising,
            args=config,
            train_dataset=Order(),
            eval_dataset=[{"picture": i, "seed": seed_of("evaluate", seed, i)} for i in measured],
            callbacks=list(callbacks),
        )

    # --- What came of it ---

    def _measured_examples(self) -> range:
        """Return which examples the loss is measured on."""
        trained = len(self.train_folder.pictures)
        return range(trained, len(self.model.examples)) if self.heldout_folder else range(trained)

    def _measured_draws(self, index: int) -> list[Draw]:
        """Return fixed draws of an example, at timesteps from all parts of the schedule."""
        import torch

        from moslora.tasks.image.denoising import seed_of

        count = self.recipe.task.loss_draws  # type: ignore[attr-defined]
        return [
            self.model.draw(
                self.model.examples[index],
                torch.Generator().manual_seed(seed_of("measure", self.recipe.seed, index, k)),
                (k, count),
            )
            for k in range(count)
        ]

    def evaluate(self, model: nn.Module, label: str) -> Evaluation:
        """Measure the loss on fixed noise, and make pictures of the recipe's prompts."""
        import torch

        self.model.eval()
        examples = self._measured_examples()
        losses: list[float] = []
        with self.display.progress(f"Denoising loss, {label}", len(examples)) as progress:
            for index in examples:
                draws = self._measured_draws(index)
                with torch.no_grad():
                    for start in range(0, len(draws), BATCH):
                        losses += self.model.losses(draws[start : start + BATCH]).tolist()
                progress.advance(1, f"loss {sum(losses) / len(losses):.4f}")
                self.checkpoint()
        unit = "held-out pictures" if self.heldout_folder else "training pictures"
        pictures = self._pictures(label)
        return Evaluation(
            {"loss": sum(losses) / len(losses)},
            len(examples),
            unit=unit,
            pictures=pictures,
            fidelity=self._fidelity(pictures, label),
        )

    def _fidelity(self, pictures: Sequence[Shown], label: str) -> dict[str, Any]:
        """Judge pictures by the models that the recipe names; say of every score without one that it is absent."""
        data: Any = self.recipe.data
        there = {judge.key: judge for judge in self.judges}
        absent = {
            name: f"task.{score.key} names no model"
            for name, score in SCORES.items()
            if score.key not in there
        }
        found: dict[str, Any] = {"absent": absent}
        if not self.judges:
            return found
        made = open_made(pictures)
        real = [(p.path.name, open_image(p.path, data.max_pixels)) for p in self.train_folder.pictures]
        with self.display.progress(f"Fidelity, {label}", len(self.judges) * len(made)) as progress:

            def checkpoint() -> None:
                progress.advance()
                self.checkpoint()

            for judge in self.judges:
                scores = judge_pictures(
                    judge,
                    self.device,
                    made,
                    real,
                    lambda prompt: about(prompt, data.token),
                    self.display.warn,
                    checkpoint,
                )
                for name, score in scores.items():
                    if score:
                        model = {"model": judge.source.name, "title": judge.title}
                        count = score["pairs"] // max(1, len(score["real"]))
                        found[name] = {**model, "pictures": count, **score}
                    else:
                        absent[name] = f"no prompt names the subject, data.token={data.token}"
        return found

    def _wanted_pictures(self) -> list[tuple[str, int]]:
        """Return prompt and seed of every picture to be shown, in their order."""
        count = self.recipe.task.pictures_per_prompt  # type: ignore[attr-defined]
        return [(prompt, self.recipe.seed + k) for prompt in self.prompts for k in range(count)]

    def shows_at(self, step: int) -> bool:
        """Whether ``task.pictures_every`` wants pictures after so many steps."""
        every = self.recipe.task.pictures_every  # type: ignore[attr-defined]
        return bool(every and self.prompts and step > 0 and step % every == 0)

    def show(self, model: nn.Module, skip: int = 0) -> Iterator[Shown]:
        """Make pictures of the recipe's prompts, with the seeds that they have before training and after."""
        for prompt, seed in self._wanted_pictures()[skip:]:
            with _undisturbed(self.model):
                content = self._make(prompt, seed)
            yield Shown(prompt, seed, data=content)

    def _pictures(self, label: str) -> list[Shown]:
        wanted = self._wanted_pictures()
        found: list[Shown] = []
        if not wanted:
            return found
        with self.display.progress(f"Pictures, {label}", len(wanted)) as progress:
            for prompt, seed in wanted:
                found.append(Shown(prompt, seed, data=self._make(prompt, seed)))
                progress.advance()
                self.checkpoint()
        return found

    def _make(self, prompt: str, seed: int) -> bytes:
        """Let the pipeline make a picture, as a PNG file."""
        import torch

        from moslora.tasks.image.denoising import decode

        task: Any = self.recipe.task
        options: dict[str, Any] = {}
        if task.guidance_scale is not None:
            options["guidance_scale"] = task.guidance_scale
        if task.negative_prompt is not None:
            options["negative_prompt"] = task.negative_prompt
        if task.max_sequence_length is not None:
            options["max_sequence_length"] = task.max_sequence_length
        pipeline = self.model.pipeline
        latents: Tensor = pipeline(
            prompt,
            height=self.resolution,
            width=self.resolution,
            num_inference_steps=task.inference_steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **options,
        ).images
        factor = pipeline.vae_scale_factor
        latents = self.family.unpack(pipeline, latents, self.resolution // factor, self.resolution // factor)
        buffer = io.BytesIO()
        decode(pipeline.vae, latents).save(buffer, "PNG")
        return buffer.getvalue()

    def live(self, model: nn.Module) -> Any:
        """Return the pipeline, with the trained adapters in it."""
        return self.model.pipeline

    def probe(self) -> list[Any]:
        """Return arguments of the denoiser, for noised pictures, and of the text encoders that are adapted."""
        import torch

        from moslora.tasks.image.denoising import seed_of

        found: list[dict[str, Tensor]] = []
        for index in list(self._measured_examples())[:PROBES]:
            for k in range(PROBE_LEVELS):
                generator = torch.Generator().manual_seed(seed_of("probe", self.recipe.seed, index, k))
                draw = self.model.draw(self.model.examples[index], generator, (k, PROBE_LEVELS))
                with torch.no_grad():
                    given, _, _ = self.model.arguments([draw])
                found.append(_flat(given, self.family.denoiser))
        for name in self.family.clips if self._with_text else ():
            tokenizer = getattr(self.model.pipeline, name.replace("text_encoder", "tokenizer"))
            prompt = self.model.examples[0][1]
            ids = tokenizer(
                prompt,
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            found.append({f"{name}.input_ids": ids})
        return found


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model work outside training: modes and every source of randomness are afterwards what they were."""
    import numpy
    import torch

    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(states[0])
            numpy.random.set_state(states[1])


def _class(value: Sequence[str]) -> Any:
    """Return the class that a pipeline's index names."""
    return getattr(importlib.import_module(value[0]), value[1])


def _flat(arguments: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        key = f"{prefix}.{name}"
        found |= _flat(value, key) if isinstance(value, Mapping) else {key: value}
    return found
