"""Base and adapters side by side on pictures: drawn of one prompt and seed, or asked about."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moslora.conversation.subjects import BASE
from moslora.data.pictures import open_image
from moslora.data.shapes import Example, Message
from moslora.display import Display
from moslora.errors import ProofError, UsageError
from moslora.evaluation.active import prove_active, with_adapter
from moslora.models.loading import default_device
from moslora.recipe.loading import load_recipe
from moslora.recipe.schema import Recipe

__all__ = ["Gallery", "Viewing", "kind_of_run", "open_gallery", "open_viewing"]


def kind_of_run(run: Path) -> str:
    """Return the kind of a run's task; ``"text"`` for what is not a run.

    Args:
        run: Its directory, or an adapter.
    """
    file = run / "recipe.yaml"
    return str(load_recipe([str(file)]).task.kind) if file.is_file() else "text"


class Gallery:
    """Draws the same prompt and seed with a base and with each adapter.

    Args:
        maker: Draws with the pipeline as it is.
        pipeline: diffusers', with every adapter in it.
        adapters: Their names.
    """

    def __init__(self, maker: Any, pipeline: Any, adapters: Sequence[str]) -> None:
        self.maker, self.pipeline = maker, pipeline
        self.names = [BASE, *adapters]

    def draw(
        self, prompt: str, seed: int, is_stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, bytes]]:
        """Draw a prompt with each model, the base first.

        Args:
            prompt: What is shown.
            seed: Of the noise, the same for all.
            is_stopped: Asked before each picture; True ends it.

        Yields:
            A model's name and its picture, a PNG file.
        """
        if not prompt.strip():
            raise UsageError("Write what is to be drawn first.")
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed={seed} must lie between 0 and 2**32 - 1.")
        for name in self.names:
            if is_stopped():
                return
            if name == BASE:
                self.pipeline.disable_lora()
            else:
                self.pipeline.enable_lora()
                self.pipeline.set_adapters([name])
            yield name, self.maker.draw(prompt, seed)


class Viewing:
    """Asks a base and each adapter about a picture.

    Args:
        task: Of the first run, with its processor.
        model: PEFT's, with every adapter in it.
        adapters: Their names.
    """

    def __init__(self, task: Any, model: Any, adapters: Sequence[str]) -> None:
        self.task, self.model = task, model
        self.names = [BASE, *adapters]

    def _inputs(self, text: str, picture: Any) -> Any:
        messages = (Message("user", f"<image>\n{text}"), Message("assistant", "x"))
        encoded = self.task.encoder.encode_question(Example("the question", messages), [picture])
        return self.task.encoder.batch([encoded], [picture], prompts=True)

    def prove(self, paths: dict[str, Path]) -> dict[str, float]:
        """Prove that each adapter changes the logits, and return by how much at most.

        Args:
            paths: Where the adapters are, by name.

        Raises:
            ProofError: If one does not.
        """
        from PIL import Image

        inputs = self._inputs("What is in the picture?", Image.new("RGB", (64, 64), (200, 60, 60)))
        found = {}
        for name, path in paths.items():
            self.model.set_adapter(name)
            found[name] = prove_active(self.model, path, [inputs], self.task.device).effect
        return found

    def ask(
        self, text: str, picture: bytes, is_stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, str]]:
        """Ask every model about a picture.

        Args:
            text: The question.
            picture: A file of a supported format.
            is_stopped: Asked before each answer; True ends it.

        Yields:
            A model's name and its answer.

        Raises:
            PictureError: If the picture cannot be read, or is too large.
        """
        from moslora.tasks.text.generation import Generation, generate

        if not text.strip():
            raise UsageError("Write a question first.")
        shown = open_image(picture, self.task.recipe.data.max_pixels)
        inputs = self._inputs(text, shown)
        stops = sorted(self.task.encoder.encoder.stop_ids)
        settings = Generation(self.task.recipe.task.max_new_tokens, stops, self.task.pad_id)
        for name in self.names:
            if is_stopped():
                return
            off: Any = self.model.disable_adapter() if name == BASE else contextlib.nullcontext()
            if name != BASE:
                self.model.set_adapter(name)
            with off:
                (answer,) = generate(self.model, self.task.tokenizer, inputs, settings, self.task.device)
            yield name, answer.strip()


def _recipes(runs: Sequence[Path], kind: str) -> list[tuple[str, Path, Recipe]]:
    """Return name, plain LoRA and recipe of each run, all of one kind and one base."""
    found: list[tuple[str, Path, Recipe]] = []
    for run in runs:
        recipe = load_recipe([str(run / "recipe.yaml")])
        if recipe.task.kind != kind:
            raise UsageError(f"{run} is of task: {recipe.task.kind}, and the first one of task: {kind}.")
        if found and recipe.model != found[0][2].model:
            raise UsageError(
                f"{run} has the base {recipe.model.name}, and the first one {found[0][2].model.name}. Side by side "
                "there is one base."
            )
        if not (run / "lora").is_dir():
            raise UsageError(f"{run} is a run without a plain LoRA (lora/): it has not ended.")
        stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in run.name) or "adapter"
        taken = {BASE, *(name for name, _, _ in found)}
        name = next(n for i in range(1, 1000) if (n := stem if i == 1 else f"{stem}-{i}") not in taken)
        found.append((name, run / "lora", recipe))
    return found


def open_gallery(runs: Sequence[Path], say: Callable[[str], None]) -> Gallery:
    """Load a pipeline with the adapters of runs.

    Args:
        runs: Directories of ``task: image`` with one base.
        say: Told what is loaded.

    Raises:
        ModelError: If the base cannot be loaded.
        ProofError: If an adapter did not find its place.
        UsageError: If the runs do not go together.
    """
    from moslora.tasks.image.pictures import PictureMaker
    from moslora.tasks.image.pipeline import download_weights, find_pipeline, load_pipeline, open_pipeline

    found = _recipes(runs, "image")
    recipe: Any = found[0][2]
    files = open_pipeline(find_pipeline(recipe.model.name, recipe.model.revision))
    files = download_weights(files, recipe.model.variant)
    say(f"Loading {recipe.model.name} …")
    device = default_device()
    pipeline = load_pipeline(files, device, _dtype(recipe), recipe.model.variant, say)
    for name, lora, _ in found:
        weights = sorted(lora.glob("*.safetensors"))
        if len(weights) != 1:
            raise UsageError(f"{lora} has {len(weights)} files of weights; one is expected.")
        pipeline.load_lora_weights(str(lora), weight_name=weights[0].name, adapter_name=name)
        parts = [part for part, names in pipeline.get_list_adapters().items() if name in names]
        if not parts:
            raise ProofError(f"{lora} found no place in {recipe.model.name}, so it would change no picture.")
        say(f"{name}: {lora}, in {', '.join(parts)}.")
    task: Any = recipe.task
    maker = PictureMaker(
        pipeline,
        files.family,
        files.resolution(recipe.data.resolution),
        task.inference_steps,
        task.guidance_scale,
        task.negative_prompt,
        task.max_sequence_length,
    )
    return Gallery(maker, pipeline, [name for name, _, _ in found])


def _dtype(recipe: Any) -> Any:
    import torch

    return None if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)


def open_viewing(runs: Sequence[Path], say: Callable[[str], None]) -> Viewing:
    """Load a vision-language model with the adapters of runs, each proven active.

    Args:
        runs: Directories of ``task: vision`` with one base.
        say: Told what is loaded, and the proof.

    Raises:
        ModelError: If the base cannot be loaded.
        ProofError: If an adapter changes no logit.
        UsageError: If the runs do not go together.
    """
    import io

    from moslora.tasks import find_task

    found = _recipes(runs, "vision")
    task: Any = find_task("vision")(found[0][2], Display(io.StringIO(), quiet=True), lambda: None)
    task.base_model.find(needs_weights=True)
    task.base_model.convert(say)
    task.encoder = task.make_encoder(None)
    task.tokenizer = task.encoder.tokenizer
    say(f"Loading {found[0][2].model.name} …")
    adapted: Any = task.load()
    for number, (name, lora, _) in enumerate(found):
        with_it = with_adapter(adapted, lora, name)
        adapted = with_it if number == 0 else adapted
    made = Viewing(task, adapted, [name for name, _, _ in found])
    paths = {name: lora for name, lora, _ in found}
    for name, effect in made.prove(paths).items():
        say(f"{name}: {paths[name]}, proven active: it moves logits by up to {effect:.2g}.")
    return made
