"""The task ``image``: learn a subject from a few pictures (DreamBooth, arXiv:2208.12242), or a style from captions.

The base is a diffusers pipeline. Its denoiser is adapted, and its text encoders if the recipe wants it. Latents are
encoded once, and so are prompts where the text encoders are frozen; what a step makes of them follows from the
recipe's seed.

The task only connects parts that can be used alone: the loader (``pipeline``), the model with its loss
(``denoising``), the trainer (``trainer``), the picture maker (``pictures``) and the scores (``scoring``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.distributed import launched
from moslora.errors import UsageError
from moslora.models.loading import default_device
from moslora.models.names import ModelSource
from moslora.recipe.schema import ImageRecipe
from moslora.recipe.trainer_arguments import build_trainer_config, resolve_trainer_arguments
from moslora.tasks.image import adapters, checks, preview
from moslora.tasks.image.comparing import ComparedTask
from moslora.tasks.image.crops import Crop, Size, bucket_size, plan_crops
from moslora.tasks.image.fidelity import ScoreModel, find_judge
from moslora.tasks.image.folders import Folder, Picture, read_folder, together, warn_of_left_out
from moslora.tasks.image.order import planned_steps
from moslora.tasks.image.pictures import PictureMaker, draw_pictures, plan_pictures
from moslora.tasks.image.pipeline import (
    PipelineFiles,
    download_weights,
    find_pipeline,
    load_pipeline,
    open_pipeline,
)
from moslora.tasks.image.prior import ClassPictures
from moslora.tasks.image.probe import probe_denoiser, probe_text_encoders
from moslora.tasks.image.prompts import Subject, evaluation_prompts
from moslora.tasks.image.randomness import undisturbed
from moslora.tasks.image.scoring import measure_fidelity, measure_loss
from moslora.tasks.task import Count, Evaluation, Shown

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import Trainer, TrainerCallback

    from moslora.tasks.image.denoising import Denoising

__all__ = ["ImageTask"]


class ImageTask(ComparedTask):
    """Fine-tune the denoiser of a diffusion pipeline on pictures.

    Attributes:
        recipe: What the user wants.
        source: The pipeline, as the recipe names it.
        files: Its files.
        subject: What is learned.
        train_folder: The pictures that are trained on.
        heldout_folder: Those that the loss is measured on; None measures it on the former.
        class_pictures: Of prior preservation; None without it.
        prompts: Of the pictures that are shown.
        judges: Models that the pictures are scored with.
        resolution: Side of crops and of pictures, in pixels.
        model: The pipeline's trained models, with the examples.
        maker: Draws pictures.
    """

    reader = "diffusers"

    recipe: ImageRecipe
    # Set by ``read``, and by ``count`` where it comes first:
    source: ModelSource
    subject: Subject
    train_folder: Folder
    heldout_folder: Folder | None
    class_pictures: ClassPictures | None
    prompts: list[str]
    judges: list[ScoreModel]
    # Set by ``prepare``:
    files: PipelineFiles
    resolution: int
    # Set by ``load``:
    model: Denoising
    maker: PictureMaker

    # --- Before any weight is loaded ---

    def count(self) -> list[Count]:
        """Count the parameters of the pipeline's models, from their configurations alone."""
        self._find()
        self._open()
        text_encoder = self._text_encoder_config() if self._with_text else None
        return adapters.count_pipeline_parameters(self.files, self.adapter_settings, text_encoder)

    def read(self) -> None:
        """Find the base, and read all pictures and their words."""
        recipe, warn = self.recipe, self.display.warn
        data, task = recipe.data, recipe.task
        self._find()
        checks.check_prior(data)
        self.subject = Subject(data.token, data.class_name)
        others = [Subject(other.token, other.class_name) for other in data.subjects]
        self.train_folder = together(
            [
                self._read(data.train, data.prompt, data.limit),
                *(
                    self._read(other.path, other.prompt or data.prompt, data.limit, subject)
                    for other, subject in zip(data.subjects, others, strict=True)
                ),
            ]
        )
        self.heldout_folder = None if data.heldout is None else self._read(data.heldout, data.prompt)
        self.class_pictures = self._find_class_pictures()
        templates = task.prompts, task.published_prompts, task.prompts_file
        prompts = [evaluation_prompts(subject, *templates) for subject in (self.subject, *others)]
        self.prompts = list(dict.fromkeys(prompt for own in prompts for prompt in own))
        models = {"dino_model": task.dino_model, "clip_model": task.clip_model}
        self.judges = [find_judge(key, name) for key, name in models.items() if name is not None]
        checks.check_idle_keys(task, data, recipe.trainer, self.prompts, warn)
        checks.warn_of_idle_words(data, self.subject.used, bool(self.judges), warn)
        checks.warn_of_overlap(self.train_folder, self.heldout_folder, warn)

    def prepare(self) -> None:
        """Read the pipeline's configuration, and tell what will be trained on."""
        data, pictures = self.recipe.data, self.train_folder.pictures
        self._open()
        checks.check_family(self.recipe.task, self.files, self._with_text, self.display.warn)
        self.resolution = self.files.resolution(data.resolution)
        checks.warn_of_sizes(pictures, self._size, data.crop, self.display.warn)
        self._tell()

    def _find(self) -> None:
        checks.check_packages()
        self.source = find_pipeline(self.recipe.model.name, self.recipe.model.revision)

    def _open(self) -> None:
        self.files = open_pipeline(self.source)
        self.auto_class = self.files.kind

    def _read(
        self, folder: str, prompt: str | None, limit: int | None = None, subject: Subject | None = None
    ) -> Folder:
        data, subject = self.recipe.data, subject or self.subject
        pictures = read_folder(
            Path(folder),
            None if prompt is None else subject.fill(prompt),
            data.max_pixels,
            data.bad_images == "skip",
            limit=limit,
            ignore=data.ignore or (),
            name_words=subject.fill,
            checkpoint=self.raise_if_stopped,
        )
        warn_of_left_out(folder, pictures, self.display.warn)
        return pictures

    def _find_class_pictures(self) -> ClassPictures | None:
        data = self.recipe.data
        if data.class_images is None or data.class_prompt is None:
            return None
        prompt = data.class_prompt
        return ClassPictures(
            Path(data.class_images),
            self.subject.fill(prompt),
            data.class_count,
            self.source.name,
            lambda folder, limit: self._read(str(folder), prompt, limit),
            self.display.warn,
        )

    def _tell(self) -> None:
        """Say what is trained, on what, and what will be drawn."""
        task, say, denoiser = self.recipe.task, self.display.say, self.files.family.denoiser
        skeleton = self.files.skeleton(denoiser)
        parameters = sum(p.numel() for p in skeleton.parameters())
        title = f"{self.source.name}'s {denoiser}"
        adapted = len(adapters.adapted_modules(skeleton, self.adapter_settings, title))
        say(preview.tell_model(self.files, parameters, adapted, self._with_text))
        for line in preview.tell_pictures(
            self.train_folder, self.heldout_folder, self.recipe.data, self.resolution, self._crops, self._size
        ):
            say(line)
        if self.class_pictures is not None:
            say(preview.tell_prior(self.class_pictures, task.prior_weight))
        every = task.pictures_every
        steps = self._planned_steps() if every else 0
        say(preview.tell_drawn_pictures(len(self.prompts), task.pictures_per_prompt, every, steps))

    def _planned_steps(self) -> int:
        arguments = resolve_trainer_arguments(self.recipe, self.device)
        return planned_steps(arguments, len(self.train_folder.pictures), launched())

    def _crops(self, picture: Picture) -> list[Crop]:
        data = self.recipe.data
        return plan_crops(picture, self._size(picture), data.crop, data.crops, data.flip, self.recipe.seed)

    def _size(self, picture: Picture) -> Size:
        if not self.recipe.data.buckets:
            return self.resolution
        return bucket_size(picture.width, picture.height, self.resolution, self.files.step)

    # --- What others ask about the run ---

    @property
    def base(self) -> ModelSource:
        """The pipeline."""
        return self.source

    @property
    def place(self) -> str:
        """The pipeline's folder, of a hub id too: its revision is the one that was loaded."""
        return str(self.files.folder)

    @property
    def variant(self) -> str | None:
        """The recipe's ``model.variant``."""
        return self.recipe.model.variant

    @property
    def device(self) -> str:
        """Where the run takes place."""
        return default_device()

    @property
    def exports(self) -> Mapping[str, tuple[str, str]]:
        """A diffusers file, and kohya's for U-Nets: diffusers rejects the kohya names of its other pipelines."""
        files = {"fold": ("lora/pytorch_lora_weights.safetensors", "diffusers")}
        return files if self.files.family.is_flow else {**files, "kohya": ("kohya.safetensors", "kohya")}

    def hashes(self) -> dict[str, Any]:
        """Return hashes of the pictures with their words, and of the pipeline."""
        data = {"train": self.train_folder.sha256}
        if self.heldout_folder is not None:
            data["heldout"] = self.heldout_folder.sha256
        if self.class_pictures is not None:
            data["class"] = self.class_pictures.fingerprint()
        judges = {judge.key: judge.fingerprint() for judge in self.judges}
        return {"data": data, "base": self.files.fingerprint(), **({"judges": judges} if judges else {})}

    @property
    def adapter_settings(self) -> dict[str, Any]:
        """The recipe's ``adapter`` section, with the modules that are adapted."""
        return adapters.with_targets(self.recipe.adapter, self.files.family)

    @property
    def _with_text(self) -> bool:
        return self.recipe.scopes.text_encoders == "adapter"

    def adapter_config(self, model: nn.Module) -> PeftConfig:
        """Return the denoiser's adapter configuration."""
        return adapters.denoiser_config(self.adapter_settings)

    def _text_encoder_config(self) -> PeftConfig:
        scopes = self.recipe.scopes
        return adapters.text_encoder_config(
            self.adapter_settings, scopes.text_encoders_r, scopes.text_encoders_alpha
        )

    # --- Model and trainer ---

    def load(self) -> nn.Module:
        """Load the pipeline, generate missing class pictures, and encode everything that is encoded once."""
        import torch

        from moslora.tasks.image.denoising import Denoising
        from moslora.tasks.image.noise import make_schedule

        task, family = self.recipe.task, self.files.family
        dtype = getattr(torch, self._dtype())
        self.files = download_weights(self.files, self.variant)
        pipeline = load_pipeline(
            self.files, self.device, dtype, self.variant, self.display.say, self.raise_if_stopped
        )
        schedule = make_schedule(pipeline.scheduler, family.is_flow, task.timesteps, task.snr_gamma)
        self.model = Denoising(
            pipeline,
            family,
            schedule,
            dtype,
            task.noise_offset,
            task.prior_weight,
            task.max_sequence_length,
            self.recipe.data.caption_dropout,
        )
        self.model.requires_grad_(False)
        self.model.eval()
        self.maker = PictureMaker(
            pipeline,
            family,
            self.resolution,
            task.inference_steps,
            task.guidance_scale,
            task.negative_prompt,
            task.max_sequence_length,
        )
        self._warn_of_cut_prompts()
        self._generate_class_pictures()
        self._encode()
        return self.model

    def _dtype(self) -> str:
        if self.recipe.model.dtype != "auto":
            return self.recipe.model.dtype
        arguments = resolve_trainer_arguments(self.recipe, self.device)
        return "float16" if arguments.get("fp16") else "bfloat16" if arguments.get("bf16") else "float32"

    def _warn_of_cut_prompts(self) -> None:
        prior = self.class_pictures.pictures if self.class_pictures else None
        folders = [self.train_folder, self.heldout_folder, prior]
        prompts = [*(p.prompt for folder in folders if folder for p in folder.pictures), *self.prompts]
        checks.warn_of_cut_prompts(
            self.model.pipeline,
            self.files.family,
            prompts,
            self.recipe.task.max_sequence_length,
            self.display.warn,
        )

    def _generate_class_pictures(self) -> None:
        pictures = self.class_pictures
        if pictures is None:
            return
        pictures.refresh()
        if not pictures.missing:
            return
        with self._progress("Generating class pictures", len(pictures.missing)) as advance:
            pictures.generate(self.draw, self.recipe.seed, advance)

    def _encode(self) -> None:
        """Encode latents, and prompts where the text encoders are frozen, once for the whole run."""
        from moslora.tasks.image.latents import encode_picture

        model, heldout = self.model, self.heldout_folder
        measured = [*self.validation_pictures, *(heldout.pictures if heldout else ())]
        pictures = [*self.train_folder.pictures, *measured]
        class_folder = self.class_pictures.pictures if self.class_pictures else None
        prior = class_folder.pictures if class_folder else ()
        with self._progress("Encoding pictures", len(pictures) + len(prior)) as advance:
            for source, examples in ((pictures, model.examples), (prior, model.prior)):
                for picture in source:
                    shots = encode_picture(
                        model.pipeline.vae,
                        picture,
                        self._size(picture),
                        self._crops(picture),
                        self.recipe.data.max_pixels,
                    )
                    examples.append((shots, picture.prompt))
                    advance()
        if not self._with_text:
            without_words = [""] if model.caption_dropout else []
            prompts = [prompt for _, prompt in [*model.examples, *model.prior]]
            model.encode_prompts([*prompts, *without_words])

    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig | None,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Make transformers' trainer on the model whose forward returns the denoising loss."""
        from transformers import set_seed

        from moslora.tasks.image.trainer import make_trainer

        if adapter is None:
            raise UsageError("task=image trains adapters.")
        recipe, family = self.recipe, self.files.family
        configs = {family.denoiser: adapter}
        if self._with_text:
            configs |= {name: self._text_encoder_config() for name in family.clips}
        set_seed(recipe.trainer.get("seed", recipe.seed))
        self.model.adapt(configs)
        for config in configs.values():
            config.base_model_name_or_path = self.source.path
            config.revision = self.source.revision
        return make_trainer(
            self.model,
            build_trainer_config(recipe, self.device, output_dir, remove_unused_columns=False),
            len(self.train_folder.pictures),
            self._measured_examples(),
            recipe.trainer.get("data_seed", recipe.seed),
            self._with_text,
            callbacks,
            self.display.say,
        )

    # --- Scores and pictures ---

    @contextmanager
    def _progress(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """Show progress; yields what is called after each piece of work, with a note if any, and may stop the run."""
        with self.display.progress(title, total) as progress:

            def advance(note: str | None = None) -> None:
                progress.advance(1, note)
                self.raise_if_stopped()

            yield advance

    def _measured_examples(self) -> range:
        """Return which examples the loss is measured on."""
        return self.heldout_set if self.heldout_folder else self.train_set

    def evaluate(self, model: nn.Module, label: str) -> Evaluation:
        """Measure the loss on fixed noise, and draw pictures of the recipe's prompts."""
        self.model.eval()
        examples = self._measured_examples()
        with self._progress(f"Denoising loss, {label}", len(examples)) as advance:
            loss = measure_loss(
                self.model,
                examples,
                self.recipe.task.loss_draws,
                self.recipe.seed,
                lambda mean: advance(f"loss {mean:.4f}"),
            )
        pictures = self._draw_pictures(label)
        return Evaluation(
            {"loss": loss},
            len(examples),
            unit="held-out pictures" if self.heldout_folder else "training pictures",
            pictures=pictures,
            fidelity=self._measure_fidelity(pictures, label),
        )

    def _measure_fidelity(self, pictures: Sequence[Shown], label: str) -> dict[str, Any]:
        data, photos = self.recipe.data, self.train_folder.pictures
        if not self.judges:
            return measure_fidelity([], pictures, photos, data.max_pixels, self.device)
        with self._progress(f"Fidelity, {label}", len(self.judges) * len(pictures)) as advance:
            return measure_fidelity(
                self.judges,
                pictures,
                photos,
                data.max_pixels,
                self.device,
                data.token,
                self.display.warn,
                advance,
            )

    def draw(self, prompt: str, seed: int) -> bytes:
        """Draw a picture with the model as it is, as a PNG file."""
        return self.maker.draw(prompt, seed)

    def _planned_pictures(self) -> list[tuple[str, int]]:
        return plan_pictures(self.prompts, self.recipe.task.pictures_per_prompt, self.recipe.seed)

    def _draw_pictures(self, label: str) -> list[Shown]:
        plan = self._planned_pictures()
        if not plan:
            return []
        with self._progress(f"Pictures, {label}", len(plan)) as advance:
            return draw_pictures(self.draw, plan, advance)

    def shows_at(self, step: int) -> bool:
        """Return whether ``task.pictures_every`` wants pictures after so many steps."""
        every = self.recipe.task.pictures_every
        return bool(every and self.prompts and step > 0 and step % every == 0)

    def show(self, model: nn.Module, skip: int = 0) -> Iterator[Shown]:
        """Draw pictures of the recipe's prompts, with the seeds that they have before training and after."""
        for prompt, seed in self._planned_pictures()[skip:]:
            with undisturbed(self.model):
                content = self.draw(prompt, seed)
            yield Shown(prompt, seed, data=content)

    def release(self) -> None:
        """Forget the pipeline."""
        del self.model, self.maker

    def live(self, model: nn.Module) -> Any:
        """Return the pipeline, with the trained adapters in it."""
        return self.model.pipeline

    def probe(self) -> list[Any]:
        """Return arguments of the denoiser, for noised pictures, and of the text encoders that are adapted."""
        inputs = probe_denoiser(self.model, self._measured_examples(), self.recipe.seed)
        if self._with_text:
            prompt = self.model.examples[0][1]
            inputs += probe_text_encoders(self.model.pipeline, self.files.family.clips, prompt)
        return inputs
