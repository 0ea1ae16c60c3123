"""The denoising loss of the user's own pictures, for a pipeline and an adapter on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.adapters.formats.pipeline import folders
from moslora.display import Display
from moslora.errors import AdapterError, ProofError, UsageError
from moslora.evaluation.active import learned_anything, with_adapter
from moslora.evaluation.judge import Subject
from moslora.evaluation.results import Activity, Measure, Report
from moslora.recipe.schema import ImageRecipe

if TYPE_CHECKING:
    from moslora.tasks.image.denoising import Denoising

__all__ = ["evaluate_own_pictures"]


def evaluate_own_pictures(
    subject: Subject,
    display: Display,
    adapter: Path | None,
    wanted: ImageRecipe,
    limit: int | None,
    metrics: Mapping[str, Any],
    compare: Callable[[Sequence[float], Sequence[float] | None], Measure],
) -> Report:
    """Measure the denoising loss of each held-out picture, on the same noises for base and adapted pipeline.

    Args:
        subject: The pipeline, by its name.
        display: Where to show progress.
        adapter: One directory for each of its models, or a LoRA file that its pipeline in diffusers loads; None for the
            pipeline alone.
        wanted: Its held-out pictures and prompts are used; without ``data.heldout`` those of ``data.train``.
        limit: Pictures at most, the first by name; None for all.
        metrics: Not used: pictures have no answers.
        compare: Makes the measure of losses.

    Raises:
        UsageError: If something was given that pictures do not have.
        AdapterError: If the adapter is of another kind of file, or for models that the pipeline lacks.
        ProofError: If the adapter's ΔW is not zero and the denoiser's output does not move.
    """
    from moslora.tasks.image.task import ImageTask

    if metrics or subject.model is not None:
        raise UsageError(
            "A pipeline is evaluated by its name, on the loss of pictures: they have no answers that metrics could "
            "judge."
        )
    quiet = display if display.quiet else Display(display.stream, quiet=True)
    task = ImageTask(wanted, quiet, lambda: None)
    task.read()
    task.prompts, task.noise_seed = [], wanted.seed
    task.prepare()
    task.display = display
    model: Any = task.load()
    examples = list(task.heldout_set or task.train_set)[:limit]
    losses = task.score(model, examples, "base")
    tuned, activity = None, None
    if adapter is not None:
        probe = task.probe()
        before = _outputs(model, probe, task.device)
        modules = _put(model, adapter)
        moved = _moved(before, _outputs(model, probe, task.device))
        learned = learned_anything(adapter)
        if moved == 0 and learned is not False:
            raise ProofError(
                f"{adapter} changes nothing of what the denoiser gives on {len(probe)} noised pictures: it was not "
                "applied. Is it for this pipeline? (moslora doctor ADAPTER --base MODEL)"
            )
        activity = Activity(moved, learned, modules, "outputs of the denoiser")
        tuned = task.score(model, examples, "tuned")
    pictures = [
        *task.train_folder.pictures,
        *(task.heldout_folder.pictures if task.heldout_folder else ()),
    ]
    lines = [
        {
            "place": pictures[number].path.name,
            "prompt": pictures[number].prompt,
            "base_loss": losses[row],
            "tuned_loss": None if tuned is None else tuned[row],
            "base_ok": None,
            "tuned_ok": None,
        }
        for row, number in enumerate(examples)
    ]
    name = None if adapter is None else str(adapter)
    return Report(subject.name, name, "data", activity, [compare(losses, tuned)], lines)


def _put(model: Denoising, adapter: Path) -> int:
    """Put an adapter into the pipeline's models; returns into how many modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    pipeline, denoiser = model.pipeline, model.family.denoiser
    parts = folders(adapter) if adapter.is_dir() else {}
    if parts:
        missing = [name for name in parts if getattr(pipeline, name, None) is None]
        if missing or denoiser not in parts:
            what = f"has no {missing[0]}" if missing else f"'s {denoiser} is not among them"
            raise AdapterError(f"{adapter} is for {', '.join(parts)}, and this pipeline {what}.")
        for name, folder in parts.items():
            adapted = with_adapter(getattr(pipeline, name), folder)
            if name in model.parts:
                model.parts[name] = adapted
        if any(name in model.family.clips for name in parts):
            prompts = list(model.encoded_prompts)
            model.encoded_prompts.clear()
            model.encode_prompts(prompts)
    elif adapter.is_file():
        pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    else:
        raise AdapterError(
            f"{adapter} is neither directories of a pipeline's models ({denoiser}, …) nor a LoRA file of diffusers. "
            "Give runs/NAME/adapter or runs/NAME/lora/pytorch_lora_weights.safetensors."
        )
    return sum(isinstance(m, BaseTunerLayer) for m in getattr(pipeline, denoiser).modules())


def _outputs(model: Denoising, probe: Sequence[Any], device: str) -> list[Any]:
    from moslora.training.reload_proof.proof import live_outputs

    return list(live_outputs(model.pipeline, probe, device).values())


def _moved(before: Sequence[Any], after: Sequence[Any]) -> float:
    return max(float((one - two).abs().max()) for one, two in zip(before, after, strict=True))
