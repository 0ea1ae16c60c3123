"""Training itself: the trainer, its callbacks, and the checkpoint it resumes from."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from moslora.errors import Stopped, UsageError
from moslora.tasks.task import Task
from moslora.training.at_start import AtStart
from moslora.training.bars import closing_bars
from moslora.training.checkpoints import Checkpoint, engine_of, processes_of
from moslora.training.context import RunContext
from moslora.training.metrics_log import MetricsLog
from moslora.training.rehearsal import rehearse

if TYPE_CHECKING:
    from torch import nn


def fit(run: RunContext, task: Task, model: nn.Module, start: AtStart) -> Any:
    """Train, from the newest complete checkpoint if there is one.

    Args:
        run: The run.
        task: Its task.
        model: The base.
        start: Measures what there is before the first step.

    Returns:
        The trainer.
    """
    from transformers import PrinterCallback

    from moslora.compat.trainer import load_checkpoint
    from moslora.training import callbacks
    from moslora.tuner.sharding import whole_size

    directory, team = run.directory, run.team
    config: Any = task.adapter_config(model)
    checkpoint = None
    if team.is_main_process:
        checkpoint = directory.latest_checkpoint(run.display.warn)
        directory.remove_incomplete_checkpoints(checkpoint.step if checkpoint else 0)
        _keep_newest(run)
    checkpoint = team.broadcast(checkpoint)
    _refuse_other_engine(run, checkpoint)
    _warn_of_world_size(run, checkpoint)
    with contextlib.ExitStack() as open_files:
        log = None
        if team.is_main_process:
            log = open_files.enter_context(
                MetricsLog(directory.metrics, checkpoint.step if checkpoint else 0)
            )
        with run.stage("train", "preparing to train"):
            recorders = [callbacks.Recorder(run, log), callbacks.Painter(run, task), *run.callbacks]
            if run.is_split:
                recorders.insert(0, callbacks.Split(start, is_resumed=checkpoint is not None))
            if directory.read().get("lengthened"):
                recorders.append(callbacks.Rescheduled())
            trainer = task.build_trainer(model, config, directory.checkpoints, recorders)
            trainer.remove_callback(PrinterCallback)
            adapted: Any = trainer.model
            if run.mix is not None:
                run.mix.put_into(adapted)
            if run.start_from is not None:
                run.start_from.put_into(adapted)
            if team.is_main_process and not run.start.exists() and checkpoint is None:
                rehearse(run, task, adapted)
            trainable = sum(whole_size(p) for p in adapted.parameters() if p.requires_grad)
            total = sum(whole_size(p) for p in adapted.parameters())
            directory.update(
                trainable_parameters=trainable,
                total_parameters=total,
                trainer=trainer.args.to_dict(),  # with every default of the installed version
            )
        team.wait()
        with run.stage("train", "preparing what is compared with"):
            task.begin(trainer, directory.path)
        if not run.is_split:
            start.measure_start(adapted, checkpoint is not None)
        team.wait()
        with run.stage("train", "training"):
            what = f"mixer {config.mixer!r}" if run.mix is None else "the mixers alone"
            if run.start_from is not None:
                what = f"starting from {run.start_from.path}"
            run.display.say(
                f"Training {trainable:,} of {total:,} parameters ({trainable / total:.2%}), {what}, r {config.r}, "
                f"learning rate {trainer.args.learning_rate:g}."
            )
            if team.size > 1:
                a_step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
                run.display.say(f"{team.size} processes train together: {a_step * team.size} rows to a step.")
            resumed = str(checkpoint.path) if checkpoint else None
            if checkpoint and 0 < trainer.args.max_steps <= checkpoint.step and not run.is_split:
                # The trainer would take one more step before it looks whether enough were taken.
                load_checkpoint(trainer, checkpoint.path)
                trainer.state.global_step = checkpoint.step
            else:
                with closing_bars(trainer), contextlib.suppress(callbacks.NothingLeft):
                    trainer.train(resume_from_checkpoint=resumed)
        if number := run.stop.agreed():
            raise Stopped(number)
        if team.is_main_process:
            _keep_newest(run)
    return trainer


def _keep_newest(run: RunContext) -> None:
    """Remove the checkpoints that the trainer would have removed after the newest one, had no kill come in between.

    The trainer itself goes by the time at which a folder changed, and would keep one that is half removed for the
    newest, and remove the others.
    """
    settings = run.recipe.trainer
    if settings.get("save_total_limit") and not settings.get("load_best_model_at_end"):
        run.directory.keep_newest_checkpoints(settings["save_total_limit"])


def _refuse_other_engine(run: RunContext, checkpoint: Checkpoint | None) -> None:
    """Refuse to go on from an optimizer's state that this way of sharing the model cannot read."""
    if checkpoint is None:
        return
    kind, path = run.recipe.parallel.kind, checkpoint.path
    wrote, reads = engine_of(path), {"fsdp": "fsdp"}.get(kind, "zero" if kind.startswith("zero") else "plain")
    if wrote != reads:
        names = {"plain": "one process or ddp", "fsdp": "fsdp", "zero": "DeepSpeed's ZeRO"}
        raise UsageError(
            f"{path} was written under {names[wrote]}, and parallel.kind={kind} cannot read its optimizer's state. Go "
            f"on as it was begun, or train its adapter in a new run: adapter.start_from={path}"
        )
    processes = processes_of(path)
    if wrote == "zero" and processes != run.team.size:
        raise UsageError(
            f"{path} was written by {processes} processes, and DeepSpeed cannot divide its optimizer's state between "
            f"{run.team.size}. Start {processes} again, or train its adapter in a new run: adapter.start_from={path}"
        )


def _warn_of_world_size(run: RunContext, checkpoint: Checkpoint | None) -> None:
    """Say where a run cannot continue to the weights of an uninterrupted one."""
    if checkpoint is None:
        return
    team = run.team
    name = "rng_state.pth" if team.size == 1 else f"rng_state_{team.rank}.pth"
    if team.maximum(int(not (checkpoint.path / name).exists())):
        run.display.warn(
            f"{checkpoint.path.name} was written by another number of processes than the {team.size} of today, or not "
            "by all: from here on random numbers, and maybe rows to a step, are others than without the interruption."
        )
