"""Training in one call: from a recipe, or from objects, to a proven plain LoRA."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.api.calling import command_or
from moslora.api.objects import take_objects
from moslora.api.run import Run
from moslora.display import Display, find_display
from moslora.errors import UsageError
from moslora.failures import verb
from moslora.recipe.building import RecipeSource, build_recipe
from moslora.terminal import hide_known_warnings
from moslora.training.borrowed import borrowed
from moslora.training.continuing import start_or_continue
from moslora.training.handed_over import HandedOver
from moslora.training.run import check as check_inputs
from moslora.training.run import resume as resume_run
from moslora.training.run import train_recipe

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["check", "mix", "resume", "train"]


@verb("train")
def train(
    recipe: RecipeSource = None,
    *,
    task: str | Mapping[str, Any] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    processor: Any = None,
    data: Any = None,
    heldout: Any = None,
    adapter: Any = None,
    trainer: Mapping[str, Any] | None = None,
    parallel: str | Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    scopes: Mapping[str, Any] | None = None,
    output: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    metrics: Mapping[str, Callable[[str, str], bool | float]] | None = None,
    progress: str | Display | None = None,
    continue_run: bool = False,
) -> Run:
    """Fine-tune a model; evaluate before and after, fold, prove, report.

    Every section of a recipe is an argument: a dict is merged over the recipe's section, a plain value means
    the same as on the command line.

    Args:
        recipe: A recipe's path, a dict of its sections, or a ``Recipe``; None if the other arguments are enough.
        task: ``"text"``, ``"vision"``, ``"image"``, ``"preference"``, ``"classification"`` or ``"reward"``, or the
            section.
        model: A name (packaged, a folder, a hub id, a GGUF file), the section, or a loaded model of transformers. That
            one is trained with an adapter and is afterwards as it was before. If no folder holds its weights, it is
            saved as ``base/`` in the run directory, because a proof and a resumed run have to load it.
        tokenizer, processor: Of a loaded model: the object, or its folder. None takes the one in the model's folder.
        data: A file or hub id, the section, or rows: a ``datasets.Dataset``, a ``DatasetDict`` or a list of dicts. Rows
            are written into the run directory as ``data/train.jsonl``; PIL images in them as files.
        heldout: Held-out examples, likewise; None takes some of ``data``.
        adapter: A dict, or a ``MoSLoRAConfig``, which replaces the recipe's section. ``{"start_from": path}`` goes on
            from an adapter.
        trainer: Fields of TRL's ``SFTConfig``, or of the configuration of the trainer that the task has.
        parallel: How a launcher's processes share the model: ``"ddp"``, ``"fsdp"``, ``"zero3"``, … or the section.
        evaluation: What is measured beside the held-out examples; ``{"also": []}`` for nothing.
        scopes: Of ``task="vision"`` and ``"image"``: which parts are adapted.
        output: The run directory, such as ``"runs/demo"``; a run never overwrites another.
        seed: Of data order, initial values and splits.
        settings: Over all of it, ``section.key=value`` as on the command line.
        callbacks: Callbacks of transformers' trainer, beside the run's own.
        metrics: By name, functions ``(answer, reference) -> bool or float``, measured on generated answers.
        progress: None for silence (warnings are Python's), ``"terminal"`` or ``"notebook"``.
        continue_run: Whether to go on with the run of this output if it was begun, and to return it if it is completed,
            instead of starting another; for a call that is made again after a restart.

    Returns:
        The run: ``path``, ``metrics``, ``also``, ``adapter``, ``lora``, ``report``, ``proofs``, ``history`` and
        ``answers``.

    Raises:
        RecipeError, DataError, ModelError, UsageError: If something cannot be used; no run directory is left.
        ProofError: If a proof failed.
        TrainingError: If training failed otherwise.
        Stopped: If Ctrl-C was pressed; ``resume`` continues.

    Example:
        >>> run = moslora.train(
        ...     model="base-model", data="data.jsonl", trainer={"max_steps": 2}, output="runs/demo"
        ... )
        >>> sorted(run.metrics["after"])
        ['loss']
        >>> run.lora.is_dir(), run.proofs["reload"]["passed"]
        (True, True)
    """
    layers, handed_over = take_objects(
        task=task,
        model=model,
        tokenizer=tokenizer,
        processor=processor,
        data=data,
        heldout=heldout,
        adapter=adapter,
        trainer=trainer,
        parallel=parallel,
        evaluation=evaluation,
        scopes=scopes,
        output=output,
        seed=seed,
        callbacks=callbacks,
        metrics=metrics,
    )
    return _train(recipe, layers, settings, handed_over, progress, "moslora.train", continue_run)


@verb("check")
def check(
    recipe: RecipeSource = None,
    *,
    settings: Sequence[str] = (),
    progress: str | Display | None = None,
    **sections: Any,
) -> None:
    """Check everything that ``train`` would use, and show what it would train on; nothing is trained or kept.

    Args:
        recipe, settings: As for ``train``.
        progress: Shows parameters, sizes and one example with its trained tokens marked; None for silence.
        **sections: The other arguments of ``train``. Of a model, its configuration and tokenizer are enough.

    Raises:
        RecipeError, DataError, ModelError, UsageError: If something cannot be used.

    Example:
        >>> moslora.check(model="base-model", data="data.jsonl", trainer={"max_steps": 2})
    """
    layers, handed_over = take_objects(**sections)
    built = build_recipe(recipe, *layers, settings=settings)
    with (
        _quiet(),
        borrowed(handed_over.model),
        tempfile.TemporaryDirectory(prefix="moslora-check-") as folder,
    ):
        check_inputs(built, find_display(progress), handed_over, Path(folder))


@verb("resume")
def resume(
    path: str | os.PathLike[str],
    progress: str | Display | None = None,
    *,
    settings: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    metrics: Mapping[str, Callable[[str, str], bool | float]] | None = None,
) -> Run:
    """Continue a run that was interrupted, killed or failed, or train one longer.

    Args:
        path: The run directory.
        progress: As for ``train``.
        settings: ``["trainer.max_steps=N"]`` or ``["trainer.num_train_epochs=N"]``, more than the run had, trains it
            longer, a completed one too; what it had measured is kept under ``history`` of its record.
        callbacks, metrics: Those that were given to ``train``; they are in no file.

    Returns:
        The run, completed.

    Raises:
        NotFoundError, UsageError: If there is no such run, or nothing is left to do.
        ProofError, TrainingError, Stopped: As for ``train``.

    Example:
        >>> try:
        ...     moslora.resume("runs/none")
        ... except moslora.NotFoundError as error:
        ...     print(error)
        runs/none is not a run: it does not exist. ...
    """
    _, handed_over = take_objects(callbacks=callbacks, metrics=metrics)
    with _quiet():
        return Run(resume_run(Path(path), find_display(progress), handed_over, list(settings)).path)


@verb("mix")
def mix(
    adapters: Sequence[str | os.PathLike[str]],
    recipe: RecipeSource = None,
    weights: Sequence[float] | str | None = None,
    progress: str | Display | None = None,
    *,
    settings: Sequence[str] = (),
    **sections: Any,
) -> Run:
    """Learn one mixer over several trained adapters, from few examples; their factors do not change.

    Args:
        adapters: Trained adapters of one base.
        recipe: What to learn from: the base and a few examples; as for ``train``.
        weights: Where the mixer starts: a factor for each adapter, or ``"mean"``; None for 1 each.
        progress, settings: As for ``train``.
        **sections: The other arguments of ``train``.

    Returns:
        The run, with one plain LoRA.

    Raises:
        AdapterError: If the adapters cannot be read, or belong to another base.
        RecipeError, DataError, ModelError, UsageError, ProofError, TrainingError, Stopped: As for ``train``.

    Example:
        >>> run = moslora.mix(
        ...     ["my-adapter", "other-adapter"],
        ...     model="base-model",
        ...     data="data.jsonl",
        ...     trainer={"max_steps": 2},
        ...     output="runs/both",
        ... )
        >>> run.proofs["frozen"]["modules"]
        4
    """
    if isinstance(adapters, str | os.PathLike) or not adapters:
        raise UsageError("adapters must be a list of trained adapters.")
    if any(setting.partition("=")[0].partition(".")[0] == "mix" for setting in settings):
        raise UsageError(
            "The section mix is built from adapters and weights; pass these arguments instead of a setting of mix."
        )
    numbers = _weights(weights, len(adapters))
    layers, handed_over = take_objects(**sections)
    paths = [str(Path(adapter).absolute()) for adapter in adapters]
    layers.append({"mix": {"adapters": paths, "weights": numbers}})
    return _train(recipe, layers, settings, handed_over, progress, "moslora.mix")


def _weights(weights: Sequence[float] | str | None, count: int) -> list[float]:
    """Return one number for each adapter."""
    if isinstance(weights, str) and weights != "mean":
        raise UsageError(f"weights={weights!r} is neither a list of numbers, such as [1, 0.5], nor 'mean'.")
    if weights is None or isinstance(weights, str):
        return [1.0 if weights is None else 1 / count] * count
    if len(weights) != count:
        raise UsageError(f"weights has {len(weights)} numbers for {count} adapters; give one for each.")
    return [float(number) for number in weights]


def _train(
    recipe: RecipeSource,
    layers: Sequence[Mapping[str, Any]],
    settings: Sequence[str],
    handed_over: HandedOver,
    progress: str | Display | None,
    function: str,
    continue_run: bool = False,
) -> Run:
    carry_out = start_or_continue if continue_run else train_recipe
    display = find_display(progress)
    built = build_recipe(recipe, *layers, settings=settings)
    with _quiet(), borrowed(handed_over.model):
        directory = carry_out(built, display, command_or(function), handed_over)
    return Run(directory.path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide PEFT's use of a deprecated name of transformers 5, which is for PEFT to change and not for the user."""
    with warnings.catch_warnings():
        hide_known_warnings()
        yield
