"""Train: from a recipe to a proven plain LoRA and a report.

recipe → data → base measured → trained → saved → folded and proven → measured again → proven once more
in a fresh process → report. Each stage is noted in ``run.json`` when it is done, so that a run that was
stopped continues where it was.

Where several processes were launched they train together; the first does everything else.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moslora.advice.advise import advise_on, short_form
from moslora.advice.situation import situation_of_task
from moslora.distributed import Team, in_main_process
from moslora.errors import ModelError, Stopped, UsageError
from moslora.failures import add_frame, raise_if_full
from moslora.files import write_text
from moslora.models.loading import default_device
from moslora.recipe.loading import load_recipe
from moslora.recipe.parallel import SPLITS_WEIGHTS, settle_parallel
from moslora.recipe.schema import Recipe
from moslora.recipe.trainer_arguments import resolve_trainer_arguments
from moslora.reports.run import write_report
from moslora.tasks import find_task
from moslora.tasks.task import Count, Task
from moslora.training import proving
from moslora.training.artifacts import write_predictions
from moslora.training.at_start import AtStart
from moslora.training.cards import write_cards
from moslora.training.context import RunContext, only_of_first
from moslora.training.fallbacks import fallbacks_shown
from moslora.training.fitting import fit
from moslora.training.handed_over import HandedOver
from moslora.training.heartbeat import heartbeat
from moslora.training.inputs import check_mix, check_same_inputs, check_start, hashes_of, with_mix
from moslora.training.longer import apply_longer, lengthened, plan_longer, refuse_other_settings
from moslora.training.measuring import measure, measure_costs, record_change
from moslora.training.provenance import collect_hardware, collect_versions
from moslora.training.proving import prove_reloaded
from moslora.training.run_directory import FollowedRun, RunDirectory, now
from moslora.training.saving import save_adapter
from moslora.training.start_from import open_start
from moslora.training.stop import StopRequest
from moslora.training.summary import show_counts, show_proofs, show_result, show_settings
from moslora.training.trainer_parts import try_trainer_parts

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["check", "resume", "train", "train_recipe"]


def check(
    recipe: Recipe | Sequence[str],
    display: Display,
    handed_over: HandedOver | None = None,
    folder: Path = Path(),
) -> None:
    """Check a recipe, count its parameters, check its data and show what would be trained on.

    No weights are loaded, and no run is written; of a model, its configuration and tokenizer are enough.

    Args:
        recipe: A checked recipe, or arguments as for ``train``.
        display: Where to tell of it.
        handed_over: Objects that a script gives beside the recipe.
        folder: Where these are written.

    Raises:
        ValueError: If recipe, data or model cannot be used.
    """
    display = only_of_first(display)
    recipe, mix = with_mix(recipe if isinstance(recipe, Recipe) else load_recipe(list(recipe)))
    start = open_start(recipe)
    recipe = settle_parallel(recipe, will_train=False)
    handed_over = handed_over or HandedOver()
    handed_over.check(recipe.task.kind, 1)
    if handed_over.needs_files:
        recipe = handed_over.write(folder, recipe, display, weights=False)
    task = find_task(recipe.task.kind)(recipe, display, lambda: None)
    task.needs_weights = False
    handed_over.put_into(task)
    problems: list[ValueError] = []
    counts: list[Count] = []
    show_settings(recipe, default_device(), display)
    try:
        if mix is None:  # of a mix the mixers alone are trained, which its own lines say
            counts = task.count()
            show_counts(counts, display)
    except ModelError as error:  # the data is worth a look all the same
        problems.append(error)
    try:
        task.read()
        if not problems:
            task.prepare()
        try_trainer_parts(recipe, default_device())
    except ValueError as error:
        if str(error) not in map(str, problems):
            problems.append(error)
    if len(problems) > 1:
        raise UsageError("\n".join(map(str, problems)))
    if problems:
        raise problems[0]
    check_mix(mix, task, display)
    check_start(start, task, display)
    if mix is None:
        named = frozenset(
            (*(f"adapter.{k}" for k in recipe.adapter), *(f"trainer.{k}" for k in recipe.trainer))
        )
        short_form(advise_on(situation_of_task(recipe, named, task, counts)), display)
    display.say("Recipe and data are fine. Nothing was trained.")


def train(arguments: Sequence[str], display: Display, command: str = "") -> RunDirectory:
    """Carry out a recipe.

    Args:
        arguments: As on the command line: a recipe's path and/or ``section.key=value``.
        display: Where to tell of progress.
        command: How it was called, for ``run.json``.

    Returns:
        The run directory, completed.

    Raises:
        ValueError: If recipe, data or model cannot be used; no run directory is left then.
        ProofError: If a proof failed. The run's status is ``failed``.
        TrainingError: If training failed otherwise; the same.
        Stopped: If it was asked to stop; the run can be resumed.
    """
    return train_recipe(load_recipe(list(arguments)), display, command)


def train_recipe(
    recipe: Recipe,
    display: Display,
    command: str = "",
    handed_over: HandedOver | None = None,
    only_as_named: bool = False,
) -> RunDirectory:
    """Carry out a recipe; result and errors are those of ``train``.

    Args:
        recipe: A checked recipe.
        display: Where to tell of progress.
        command: How it was called, for ``run.json``.
        handed_over: Objects that a script gives beside the recipe.
        only_as_named: Whether a run of that name, which has come up meanwhile, is an error; usually the new one gets
            a number.
    """
    handed_over = handed_over or HandedOver()
    display = only_of_first(display)
    recipe, mix = with_mix(recipe)
    start = open_start(recipe)
    recipe = settle_parallel(recipe)
    team = Team.join(recipe.trainer, recipe.parallel.kind in SPLITS_WEIGHTS)
    kind, own = recipe.task.kind, None
    handed_over.check(kind, team.size)
    with StopRequest(display, team) as stop, contextlib.ExitStack() as until_usable:
        if handed_over.needs_files:
            parent = Path(recipe.output.dir)
            is_new = not parent.exists()
            own = RunDirectory.create(parent, recipe.output.name or kind)
            until_usable.callback(_remove, own.path, is_new)
            recipe = handed_over.write(own.path, recipe, display)
        task = find_task(kind)(recipe, display, stop.check)
        handed_over.put_into(task)
        task.check_adapter()
        task.read()
        task.prepare()
        check_mix(mix, task, display)
        check_start(start, task, display)
        try_trainer_parts(recipe, default_device())
        resolved = resolve_trainer_arguments(recipe, default_device())
        recipe = recipe.model_copy(update={"trainer": resolved})
        if team.is_main_process:
            text, about = recipe.to_yaml(), {"command": command, "seed": recipe.seed}
            if own is None:
                place, name = Path(recipe.output.dir), recipe.output.name or kind
                directory = RunDirectory.create(place, name, text, only_as_named, **about)
            else:
                directory = own
                directory.update(**about)
                write_text(directory.recipe, text)
            until_usable.pop_all()
            display.say(f"Run: {directory.path}")
            team.broadcast(directory.path)
        else:
            directory = FollowedRun(team.broadcast(Path()))
        run = RunContext(directory, recipe, display, stop, mix, team, handed_over.callbacks, start)
        return _run_stages(run, task)


def _remove(path: Path, with_parent: bool) -> None:
    """Remove a run directory of which nothing came, and the folder of runs if it was made for it."""
    shutil.rmtree(path, ignore_errors=True)
    if with_parent:
        with contextlib.suppress(OSError):  # another run has begun in it
            path.parent.rmdir()


def resume(
    path: Path,
    display: Display,
    handed_over: HandedOver | None = None,
    settings: Sequence[str] = (),
    wait: float = 0.0,
) -> RunDirectory:
    """Continue with a run that was interrupted, killed or failed, or prove one whose proof could not be carried out.

    Args:
        path: Its directory.
        display: Where to tell of progress.
        handed_over: Callbacks and metrics that the script gave to the run; they are in no file.
        settings: ``trainer.max_steps=N`` or ``trainer.num_train_epochs=N``, to train longer, also a completed run.
        wait: Seconds to wait for a process that seems to run it still.

    Returns:
        The run directory, completed.

    Raises:
        ValueError, FileNotFoundError: If there is no such run, or nothing is left to do.
        RuntimeError: If another process still runs it.
        ProofError, TrainingError, Stopped: As for ``train``.
    """
    handed_over = handed_over or HandedOver()
    refuse_other_settings(path, settings)
    directory = RunDirectory.open(path)
    longer = plan_longer(directory, settings) if settings else None
    if proving.is_unproven(directory):
        return _prove_later(directory, only_of_first(display))
    if directory.read().get("status") == "completed" and longer is None:
        again = "" if directory.report.exists() else f" moslora report {path} makes its report again."
        raise UsageError(
            f"{path} is completed; nothing is left to do. To train it longer, say how long: moslora train "
            f"--resume {path} trainer.max_steps=N. To train its adapter on other data, start a new run with "
            f"adapter.start_from={directory.adapter}.{again}"
        )
    if not directory.recipe.is_file():
        raise UsageError(
            f"{path} was stopped before its recipe was written, so nothing was trained in it. Remove it, and start "
            "again as you did."
        )
    display = only_of_first(display)
    changes = lengthened(directory.read()) if longer is None else longer.settings
    recipe, mix = with_mix(load_recipe([str(directory.recipe), *changes]))
    start = open_start(recipe)
    recipe = settle_parallel(recipe)
    team = Team.join(recipe.trainer, recipe.parallel.kind in SPLITS_WEIGHTS)
    with StopRequest(display, team) as stop:
        task = find_task(recipe.task.kind)(recipe, display, stop.check)
        handed_over.put_into(task)
        # Refusals come before the claim, so that they leave the run's status as it was.
        task.read()
        task.prepare()
        check_mix(mix, task, display)
        check_start(start, task, display)
        check_same_inputs(directory, hashes_of(task, mix, start))
        team.wait()  # until all have looked at the record, before it changes
        if team.is_main_process:
            if longer is not None:
                apply_longer(directory, longer, recipe, display)
            elif changes:
                write_text(directory.recipe, recipe.to_yaml())
            directory.claim(wait)
            display.say(f"Resuming {directory.path}")
        else:
            directory = FollowedRun(directory.path)
        run = RunContext(directory, recipe, display, stop, mix, team, handed_over.callbacks, start)
        return _run_stages(run, task)


def _prove_later(directory: RunDirectory, display: Display) -> RunDirectory:
    """Make up for the reload proof of a completed run; nothing else is done again."""
    if not in_main_process():
        return FollowedRun(directory.path)
    with StopRequest(display) as stop:
        try:
            proving.prove_later(directory, display, stop.check)
            write_cards(directory, display)
        finally:
            _write_report(directory, display)
    show_proofs(directory.read()["proofs"], display)
    return directory


def _run_stages(run: RunContext, task: Task) -> RunDirectory:
    """Run all stages, and leave a truthful status whatever happens."""
    try:
        if run.team.is_main_process:
            with heartbeat(run.directory), fallbacks_shown(run.display):
                _stages(run, task)
        else:
            _stages(run, task)
    except (Stopped, KeyboardInterrupt) as stopped:
        _end_interrupted(
            run, stopped.signal_number if isinstance(stopped, Stopped) else signal.SIGINT, stopped
        )
    except BaseException as error:
        if run.team.size > 1 and run.stop.received is not None:
            _end_interrupted(
                run, run.stop.received, error
            )  # another process stopped first, and was waited for in vain
        if not run.team.is_main_process:
            raise
        run.directory.end("failed", error=f"{type(error).__name__}: {error}")
        _write_report(run.directory, run.display)
        path, stage = run.directory.path, run.directory.read().get("stage")
        go_on = f"continue from where it was: moslora train --resume {shlex.quote(str(path))}"
        raise_if_full(error, path, go_on)
        add_frame(error, f"the run {path} was at this stage: {stage}", f"Then {go_on}")
        raise
    if run.team.is_main_process:
        done = {"status": "completed", "stage": "done", "ended": now()}
        # Before it is completed, so that a completed run has one.
        _write_report(run.directory, run.display, **done)
        run.directory.update(**done)
    return run.directory


def _end_interrupted(run: RunContext, number: int, cause: BaseException) -> NoReturn:
    """Leave the run as one that can continue, and say how; the first process does."""
    if not run.team.is_main_process:
        raise Stopped(number) from cause
    run.directory.end("interrupted")
    _write_report(run.directory, run.display)
    step = run.directory.latest_checkpoint(lambda _: None)
    kept = f"with the checkpoint of step {step.step}" if step else "before its first checkpoint"
    run.display.say(f"Interrupted {kept}. Continue with: moslora train --resume {run.directory.path}")
    raise Stopped(number) from cause


def _write_report(directory: RunDirectory, display: Display, **fields: Any) -> None:
    """Write the report. It shows a run and must not decide one, so its failure is only told.

    Args:
        directory: The run.
        display: Where to tell.
        **fields: What ``run.json`` is about to say.
    """
    try:
        write_report(directory.path, **fields)
    except Exception as error:
        display.warn(
            f"The report could not be written: {error} Try again with: moslora report {directory.path}"
        )


def _stages(run: RunContext, task: Task) -> None:
    """Go through all stages, in every process of the team until it parts, then in the first alone."""
    team, together = run.team, task.measures_together
    if together:
        task.team = team
    run.stop.in_step = together
    if team.is_main_process:
        _describe(run, task)
    model = _load(run, task)
    start = AtStart(run, task, model)
    if not run.is_split:
        start.measure_base(model)
        team.wait()
    trainer = fit(run, task, model, start)
    # Without the trainer's mixed precision: what is measured and proven runs as anyone will load it.
    adapted = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if not together:
        team.shut_down()
        if not team.is_main_process:
            return
    with run.stage("save", "saving and folding the adapter"):
        save_adapter(run, task, adapted, trainer.state.global_step)
    after = measure(run, task, adapted, "after", "tuned model")
    measure_costs(run, task, adapted, start.remembered)
    with run.stage("prove", "proving the exported LoRA"):
        observed = proving.observe(run, task, adapted)
        # The fresh process loads the base again: nothing of the first may be in its way.
        proving.release(task, trainer)
        before = start.release()
        del model, trainer, adapted
        proving.collect_garbage()
        run.stop.in_step = False
        if together:
            team.shut_down()
        if team.is_main_process:
            _finish(run, task, before, after, observed)


def _describe(run: RunContext, task: Task) -> None:
    """Note what the run is made from, and on what."""
    run.directory.update(
        processes=run.team.size,
        versions=collect_versions(),
        hardware=collect_hardware(),
        hashes=hashes_of(task, run.mix, run.start_from),
        **({"start_from": run.start_from.story} if run.start_from is not None else {}),
        remarks=task.remarks,
        base={
            "name": run.recipe.model.name,
            "path": str(task.base.path),
            "auto_class": task.auto_class,
            "reader": task.reader,
            **({"variant": task.variant} if task.variant else {}),
        },
    )


def _load(run: RunContext, task: Task) -> Any:
    """Load the base, the first process before the others: what it makes once, as pictures of a class, is there for all.

    Where each process takes a part of every weight as it comes, all load at once.
    """
    in_turn = not run.is_split
    with run.stage("load", "loading the base model"):
        if in_turn and not run.team.is_main_process:
            run.team.wait()
        model = task.load()
        if in_turn and run.team.is_main_process:
            run.team.wait()
    run.team.wait()
    return model


def _finish(run: RunContext, task: Task, before: Any, after: Any, observed: proving.Observed) -> None:
    """Prove, and tell of the run; its model is gone, and the other processes are, too."""
    record_change(run, before, after)
    notes = task.notes(before, after)
    run.directory.update(remarks=[*task.remarks, *notes])
    write_predictions(run, before.answers, after.answers)
    prove_reloaded(run, observed)
    write_cards(run.directory, run.display)
    show_result(run, task, before, after, run.display)
    for note in notes:
        run.display.warn(note)
