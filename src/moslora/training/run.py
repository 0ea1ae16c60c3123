"""Train: from a recipe to a proven plain LoRA and a report.

recipe → data → base measured → trained → saved → folded and proven → measured again → proven once more
in a fresh process → report. Each stage is noted in ``run.json`` when it is done, so that a run that was
stopped goes on where it was.

Where several processes were launched they train together; the first does everything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from moslora.adapters.export import export_adapter
from moslora.adapters.formats.native import keep_start, read_start
from moslora.adapters.formats.pipeline import folders
from moslora.distributed import Team, is_first, refuse_sharding
from moslora.errors import ModelError, ProofError, Stopped, TrainingError
from moslora.files import new_directory
from moslora.models.loading import default_device
from moslora.recipe.schema import Recipe, load_recipe, resolve_trainer_arguments
from moslora.reports.run import write_report
from moslora.tasks import find_task
from moslora.tasks.task import Answer, Count, Evaluation, Shown, Task
from moslora.training.mix import Mix, open_mix
from moslora.training.run_directory import (
    Checkpoint,
    FollowedRun,
    MetricsLog,
    RunDirectory,
    collect_hardware,
    collect_versions,
    write_whole,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerCallback

    from moslora.display import Display

__all__ = ["StopRequest", "check", "resume", "train"]


# Small copies of the pictures that questions are about: how many at most, and their longer side in pixels.
SMALL_COPIES, SMALL = 200, 320


class StopRequest:
    """Remembers Ctrl-C and SIGTERM until the run reaches a place where it can go on later.

    Used as a context manager it takes the two signals over. The second one ends the run at once.

    Args:
        display: Told when a request comes in.
        team: The processes of the run.
    """

    def __init__(self, display: Display, team: Team | None = None) -> None:
        self.display = display
        self.team = team or Team()
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self.display.say("Stopping at the next safe place. Once more stops at once.", style="yellow")

    def check(self) -> None:
        """Stop here if asked to; of several processes the first alone, the others where all agree.

        Raises:
            Stopped: If a signal came in.
        """
        if self.received is not None and self.team.first:
            raise Stopped(self.received)

    def agreed(self) -> int | None:
        """Return the signal that any of the run's processes was sent; all of them have to ask at the same place."""
        return self.team.largest(self.received or 0) or None


@dataclass
class _Run:
    """A run in progress: what every stage needs."""

    directory: RunDirectory
    recipe: Recipe
    display: Display
    stop: StopRequest
    mix: Mix | None = None
    team: Team = field(default_factory=Team)
    within: float = 0.0  # seconds that stages have taken, each with all that was inside it
    doing: str | None = None

    @property
    def start(self) -> Path:
        """Where the mixers' start is kept until the adapter is saved."""
        return self.directory.path / "start.safetensors"

    @contextlib.contextmanager
    def stage(self, name: str, doing: str) -> Iterator[None]:
        """Note a stage, in words too, and how long it took; time of earlier tries is added to, of inner stages not."""
        self.stop.check()
        outer, self.doing = self.doing, doing
        self.directory.update(stage=doing)
        started, before_it = time.monotonic(), self.within
        try:
            yield
            if outer is not None:
                self.directory.update(stage=outer)
        finally:
            self.doing = outer
            whole = time.monotonic() - started
            own = whole - (self.within - before_it)
            self.within = before_it + whole
            key = f"{name}_seconds"
            spent = round(self.directory.read().get("timing", {}).get(key, 0.0) + own, 3)
            self.directory.update(timing={key: spent})


def check(arguments: Sequence[str], display: Display) -> None:
    """Check a recipe, count its parameters, check its data and show what would be trained on.

    No weights are loaded, and no run is written; of a model, its configuration and tokenizer are enough.

    Args:
        arguments: As for ``train``.
        display: Where to tell of it.

    Raises:
        ValueError: If recipe, data or model cannot be used.
    """
    display = _voice(display)
    recipe, mix = _with_mix(load_recipe(list(arguments)))
    refuse_sharding(recipe.trainer)
    task = find_task(recipe.task.kind)(recipe, display, lambda: None)
    task.needs_weights = False
    problems: list[ValueError] = []
    try:
        if mix is None:  # of a mix the mixers alone are trained, which its own lines say
            _show_counts(task.count(), display)
    except ModelError as error:  # the data is worth a look all the same
        problems.append(error)
    try:
        task.read()
        if not problems:
            task.prepare()
    except ValueError as error:
        if str(error) not in map(str, problems):
            problems.append(error)
    if len(problems) > 1:
        raise ValueError("\n".join(map(str, problems)))
    if problems:
        raise problems[0]
    _check_mix(mix, task, display)
    display.say("Recipe and data are fine. Nothing was trained.")


def _show_counts(counts: Sequence[Count], display: Display) -> None:
    """Show parameters of the base and of what is trained, part by part."""
    if not counts:
        return
    rows = [[c.part, f"{c.base:,}", f"{c.trained:,}"] for c in counts]
    base, trained = sum(c.base for c in counts), sum(c.trained for c in counts)
    if len(counts) > 1:
        rows.append(["all", f"{base:,}", f"{trained:,}"])
    display.table("Parameters, counted from the configuration", ["", "base", "trained"], rows)
    display.say(f"Training {trained:,} parameters beside a base of {base:,} ({trained / base:.2%}).")


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
    display = _voice(display)
    recipe, mix = _with_mix(load_recipe(list(arguments)))
    refuse_sharding(recipe.trainer)
    team = Team.join(recipe.trainer)
    with StopRequest(display, team) as stop:
        task = find_task(recipe.task.kind)(recipe, display, stop.check)
        task.read()
        task.prepare()
        _check_mix(mix, task, display)
        resolved = resolve_trainer_arguments(recipe, default_device())
        kind, recipe = recipe.task.kind, recipe.model_copy(update={"trainer": resolved})
        if team.first:
            directory = RunDirectory.create(Path(recipe.output.dir), recipe.output.name or kind)
            display.say(f"Run: {directory.path}")
            write_whole(directory.recipe, recipe.to_yaml())
            directory.update(command=command, seed=recipe.seed)
            team.share(directory.path)
        else:
            directory = FollowedRun(team.share(Path()))
        return _carry_out(_Run(directory, recipe, display, stop, mix, team), task)


def resume(path: Path, display: Display) -> RunDirectory:
    """Go on with a run that was interrupted, killed or failed.

    Args:
        path: Its directory.
        display: Where to tell of progress.

    Returns:
        The run directory, completed.

    Raises:
        ValueError, FileNotFoundError: If there is no such run, or nothing is left to do.
        RuntimeError: If another process still runs it.
        ProofError, TrainingError, Stopped: As for ``train``.
    """
    directory = RunDirectory.open(path)
    if directory.read().get("status") == "completed":
        raise ValueError(f"{path} is completed; nothing is left to do. Start a new run to train more.")
    display = _voice(display)
    recipe, mix = _with_mix(load_recipe([str(directory.recipe)]))
    refuse_sharding(recipe.trainer)
    team = Team.join(recipe.trainer)
    with StopRequest(display, team) as stop:
        task = find_task(recipe.task.kind)(recipe, display, stop.check)
        # Refusals come before the claim, so that they leave the run's status as it was.
        task.read()
        task.prepare()
        _check_mix(mix, task, display)
        _check_same_inputs(directory, _hashes(task, mix))
        team.wait()  # until all have looked at the record, before it changes
        if team.first:
            directory.claim()
            display.say(f"Resuming {directory.path}")
        else:
            directory = FollowedRun(directory.path)
        return _carry_out(_Run(directory, recipe, display, stop, mix, team), task)


def _voice(display: Display) -> Display:
    """Let the first of several processes speak for all; what they have to say is the same."""
    from moslora.display import Display as AnyDisplay

    return display if is_first() else AnyDisplay(io.StringIO(), quiet=True)


def _with_mix(recipe: Recipe) -> tuple[Recipe, Mix | None]:
    """Open the adapters that a recipe mixes, and let them decide modules and ranks."""
    if recipe.mix is None:
        return recipe, None
    mix = open_mix(recipe.mix.adapters, recipe.mix.weights)
    return mix.adjust(recipe), mix


def _check_mix(mix: Mix | None, task: Task, display: Display) -> None:
    """Refuse adapters of another base, and say what is mixed."""
    if mix is None:
        return
    base = task.base
    warning = mix.check_base(task.recipe.model.name, str(base.path), task.hashes()["base"])
    if warning:
        display.warn(warning)
    for path, weight in zip(mix.sources, mix.weights, strict=True):
        display.say(f"Mixing {path}, weight {weight:g}: its A and B stay as they are.")
    display.say(
        "Modules and ranks are the adapters'; of the recipe's adapter section lora_dropout alone counts."
    )


def _hashes(task: Task, mix: Mix | None) -> dict[str, Any]:
    """Return what identifies everything that a run is made from."""
    if mix is None:
        return task.hashes()
    return {
        **task.hashes(),
        "adapters": [dict(hashes) for hashes in mix.hashes],
        "weights": list(mix.weights),
    }


def _carry_out(run: _Run, task: Task) -> RunDirectory:
    """Run all stages, and leave a truthful status whatever happens."""
    try:
        _stages(run, task) if run.team.first else _follow(run, task)
    except (Stopped, KeyboardInterrupt) as stopped:
        _note_stop(run, stopped.signal_number if isinstance(stopped, Stopped) else signal.SIGINT, stopped)
    except BaseException as error:
        if run.team.size > 1 and run.stop.received is not None:
            _note_stop(
                run, run.stop.received, error
            )  # another process stopped first, and was waited for in vain
        if not run.team.first:
            raise
        run.directory.update(status="failed", error=f"{type(error).__name__}: {error}")
        _report(run)
        raise
    if run.team.first:
        run.directory.update(status="completed", stage="done")
        _report(run)
    return run.directory


def _note_stop(run: _Run, number: int, cause: BaseException) -> NoReturn:
    """Leave the run as one that can go on, and say how; the first process does."""
    if not run.team.first:
        raise Stopped(number) from cause
    run.directory.update(status="interrupted")
    _report(run)
    step = run.directory.latest_checkpoint(lambda _: None)
    kept = f"with the checkpoint of step {step.step}" if step else "before its first checkpoint"
    run.display.say(f"Interrupted {kept}. Go on with: moslora train --resume {run.directory.path}")
    raise Stopped(number) from cause


def _report(run: _Run) -> None:
    """Write the report. It shows a run and must not decide one, so its failure is only told."""
    try:
        write_report(run.directory.path)
    except Exception as error:
        run.display.warn(f"The report could not be written: {error}")


def _follow(run: _Run, task: Task) -> None:
    """Take part in the training of a run that the first process keeps."""
    run.team.wait()  # the first loads alone: what it makes once, as pictures of a class, is then there for all
    model = task.load()
    run.team.wait()
    _train(run, task, model)
    run.team.leave()


def _stages(run: _Run, task: Task) -> None:
    directory, display = run.directory, run.display
    directory.update(
        processes=run.team.size,
        versions=collect_versions(),
        hardware=collect_hardware(),
        hashes=_hashes(task, run.mix),
        base={
            "name": run.recipe.model.name,
            "path": str(task.base.path),
            "auto_class": task.auto_class,
            "reader": task.reader,
            **({"variant": task.variant} if task.variant else {}),
        },
    )
    with run.stage("load", "loading the base model"):
        model = task.load()
    run.team.wait()
    before = _measure(run, task, model, "before", "base model")
    run.team.wait()
    trainer = _train(run, task, model)
    # Without the trainer's mixed precision: what is measured and proven runs as anyone will load it.
    adapted = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    run.team.leave()
    with run.stage("save", "saving and folding the adapter"):
        _save(run, task, adapted)
    after = _measure(run, task, adapted, "after", "tuned model")
    _note_change(run, before, after)
    _write_answers(run, before.answers, after.answers)
    with run.stage("prove", "proving the exported LoRA"):
        _prove_reload(run, task, adapted)
    _show_result(run, task, before, after, display)


def _check_same_inputs(directory: RunDirectory, hashes: dict[str, Any]) -> None:
    """Refuse to go on with other data or another base than the run began with."""
    old = directory.read().get("hashes")
    if old is None:
        return
    changed = [name for name in hashes if old.get(name) != json.loads(json.dumps(hashes[name]))]
    if changed:
        raise ValueError(
            f"Cannot go on with {directory.path}: its {' and '.join(changed)} changed since it began. Put "
            "the old files back, or start a new run."
        )


def _evaluation_file(run: _Run, stage: str) -> Path:
    return run.directory.path / f"evaluation-{stage}.json"


def _measured(run: _Run, stage: str) -> Evaluation | None:
    """Read what was measured in a stage; None if nothing was yet."""
    kept = _evaluation_file(run, stage)
    if not kept.exists():
        return None
    found = json.loads(kept.read_text(encoding="utf-8"))
    answers = [Answer(**answer) for answer in found.pop("answers")]
    pictures = [Shown(**shown) for shown in found.pop("pictures", [])]
    return Evaluation(**found, answers=answers, pictures=pictures)


def _measure(run: _Run, task: Task, model: nn.Module, stage: str, label: str) -> Evaluation:
    """Evaluate, or read what an earlier try of the run has measured already."""
    kept = _evaluation_file(run, stage)
    found = _measured(run, stage)
    if found is not None:
        return found
    with run.stage(stage, f"measuring the {label}"):
        evaluation = task.evaluate(model, label)
    loss = evaluation.metrics["loss"]
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise TrainingError(
            f"The held-out loss of the {label} is {loss}. "
            + ("Training diverged; lower trainer.learning_rate." if stage == "after" else "Check the base.")
        )
    evaluation = dataclasses.replace(evaluation, pictures=_keep_pictures(run, stage, evaluation.pictures))
    values = dataclasses.asdict(evaluation)
    for shown in values["pictures"]:
        del shown["data"]
    write_whole(kept, json.dumps(values, ensure_ascii=False))
    run.directory.update(
        **({"pictures": {stage: values["pictures"]}} if values["pictures"] else {}),
        **({"fidelity": {stage: dict(evaluation.fidelity)}} if evaluation.fidelity else {}),
        metrics={
            stage: dict(evaluation.metrics),
            "intervals": {stage: {name: list(ends) for name, ends in evaluation.intervals.items()}},
            "examples": evaluation.examples,
            "unit": evaluation.unit,
            "answers": len(evaluation.answers),
        },
    )
    return evaluation


def _note_change(run: _Run, before: Evaluation, after: Evaluation) -> None:
    """Note how scores of pictures changed, prompt by prompt."""
    from moslora.tasks.image.fidelity import SCORES, paired_change

    names = [name for name in SCORES if name in before.fidelity and name in after.fidelity]
    if names:
        changes = {name: paired_change(before.fidelity[name], after.fidelity[name]) for name in names}
        run.directory.update(fidelity={"change": changes})


def _keep_pictures(run: _Run, stage: str, pictures: Sequence[Shown]) -> list[Shown]:
    """Write pictures into the run directory, each whole or not at all."""
    return [_keep_shown(run, f"{number:03d}-{stage}", shown) for number, shown in enumerate(pictures)]


def _keep_shown(run: _Run, name: str, shown: Shown) -> Shown:
    return Shown(shown.prompt, shown.seed, _keep_picture(run, f"{name}.png", shown.data))


def _keep_picture(run: _Run, name: str, data: bytes) -> str:
    """Write a picture whole or not at all; return where, from the run directory on."""
    path = run.directory.path / "pictures" / name
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return f"pictures/{name}"


def _train(run: _Run, task: Task, model: nn.Module) -> Any:
    """Train, from the newest complete checkpoint if there is one."""
    from transformers import PrinterCallback

    directory, team = run.directory, run.team
    config: Any = task.adapter_config(model)
    checkpoint = team.share(directory.latest_checkpoint(run.display.warn) if team.first else None)
    _warn_of_other_numbers(run, checkpoint)
    with contextlib.ExitStack() as open_files:
        log = None
        if team.first:
            log = open_files.enter_context(
                MetricsLog(directory.metrics, checkpoint.step if checkpoint else 0)
            )
        with run.stage("train", "preparing to train"):
            callbacks = [_recorder(run, log), _painter(run, task)]
            trainer = task.build_trainer(model, config, directory.checkpoints, callbacks)
            trainer.remove_callback(PrinterCallback)
            adapted: Any = trainer.model
            if run.mix is not None:
                run.mix.put_into(adapted)
            if team.first and not run.start.exists() and checkpoint is None:
                _keep_start(run, adapted)
            trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
            total = sum(p.numel() for p in adapted.parameters())
            directory.update(
                trainable_parameters=trainable,
                total_parameters=total,
                trainer=trainer.args.to_dict(),  # with every default of the installed version
            )
        if run.mix is not None and team.first:
            _measure(run, task, adapted, "start", "weighted sum")
        team.wait()
        with run.stage("train", "training"):
            what = f"mixer {config.mixer!r}" if run.mix is None else "the mixers alone"
            run.display.say(
                f"Training {trainable:,} of {total:,} parameters ({trainable / total:.2%}), {what}, r {config.r}, "
                f"learning rate {trainer.args.learning_rate:g}."
            )
            if team.size > 1:
                a_step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
                run.display.say(f"{team.size} processes train together: {a_step * team.size} rows to a step.")
            if checkpoint and 0 < trainer.args.max_steps <= checkpoint.step:
                # The trainer would take one more step before it looks whether enough were taken.
                trainer._load_from_checkpoint(str(checkpoint.path))
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        if number := run.stop.agreed():
            raise Stopped(number)
    return trainer


def _warn_of_other_numbers(run: _Run, checkpoint: Checkpoint | None) -> None:
    """Say where a run cannot go on to the weights of an uninterrupted one."""
    if checkpoint is None:
        return
    team = run.team
    name = "rng_state.pth" if team.size == 1 else f"rng_state_{team.rank}.pth"
    if team.largest(int(not (checkpoint.path / name).exists())):
        run.display.warn(
            f"{checkpoint.path.name} was written by another number of processes than the {team.size} of today, or not "
            "by all: from here on random numbers, and maybe rows to a step, are others than without the interruption."
        )


def _keep_start(run: _Run, adapted: Any) -> None:
    """Keep what the mixers start as: no seed gives it again in another version of torch."""
    from safetensors.torch import save_file

    from moslora.adapters.formats.reading import read_adapter

    with tempfile.TemporaryDirectory(prefix=".start.", dir=run.directory.path) as folder:
        adapted.save_pretrained(folder)  # whose names are those of what is saved in the end
        mixers = {name: f.M.contiguous() for name, f in read_adapter(folder).modules.items()}
        save_file(mixers, Path(folder) / run.start.name)
        (Path(folder) / run.start.name).replace(run.start)


def _recorder(run: _Run, log: MetricsLog | None) -> TrainerCallback:
    """Make the callback that writes metrics, shows progress and obeys a request to stop."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.stack = contextlib.ExitStack()
            self.progress: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps = state.max_steps - state.global_step
            self.progress = self.stack.enter_context(run.display.progress("Training", steps))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if log is not None:
                log.append(state.global_step, **{k: v for k, v in (logs or {}).items() if k != "step"})
            if "loss" in (logs or {}):
                self.progress.note = f"loss {float(logs['loss']):.4f}"

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            self.progress.advance()
            if run.stop.agreed():
                control.should_save = True
                control.should_training_stop = True
            return control

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stack.close()

    return Recorder()


def _painter(run: _Run, task: Task) -> TrainerCallback:
    """Make the callback that keeps what the model draws on the way, where the recipe wants it.

    A request to stop is obeyed between two pictures. The missing ones are made when the run goes on from that very
    step, before it takes another.
    """
    from transformers import TrainerCallback

    class Painter(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.paint(state, model)
            if number := run.stop.agreed():
                raise Stopped(number)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
            if self.paint(state, model) and run.stop.agreed():
                control.should_save = True
                control.should_training_stop = True
            return control

        def paint(self, state: Any, model: Any) -> bool:
            """Make what is due, in the first process; say in all of them whether anything was."""
            step = state.global_step
            due = task.shows_at(step) and 0 < step < state.max_steps  # after the last the run measures anyway
            if not due or not run.team.first or run.stop.received is not None:
                return due
            during = run.directory.read().get("pictures", {}).get("during", {})
            kept = list(during.get(str(step), []))
            with contextlib.suppress(Stopped), run.stage("pictures", f"making pictures after step {step}"):
                for shown in task.show(model, len(kept)):
                    found = dataclasses.asdict(_keep_shown(run, f"{len(kept):03d}-step-{step}", shown))
                    del found["data"]
                    kept.append(found)
                    run.directory.update(pictures={"during": {str(step): kept}})
                    if run.stop.received is not None:
                        break
            return True

    return Painter()


def _save(run: _Run, task: Task, adapted: Any) -> None:
    """Save the native adapter, then its fold with the proof on the written files."""
    import torch

    directory = run.directory
    broken = [n for n, p in adapted.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if broken:
        raise TrainingError(
            f"Training diverged: {broken[0]} has NaN or infinite values, so nothing was saved. Lower "
            "trainer.learning_rate, or set trainer.max_grad_norm."
        )
    # A run that was stopped after this stage has trained nothing since; what it saved is written anew.
    for place in (directory.adapter, *_shipped(run, task)):
        _remove(place)
    with new_directory(directory.adapter) as folder:
        adapted.save_pretrained(folder)
        if run.start.exists():
            _keep_start_beside(folder, read_start(run.start))
    if run.mix is not None:
        frozen = run.mix.prove(directory.adapter)
        directory.update(proofs={"frozen": {**dataclasses.asdict(frozen), "passed": True}})
    for (name, (_, format_)), place in zip(task.exports.items(), _shipped(run, task), strict=True):
        place.parent.mkdir(exist_ok=True)
        proof = export_adapter(directory.adapter, place, format_)
        directory.update(proofs={name: {**dataclasses.asdict(proof), "passed": proof.passed}})


def _keep_start_beside(folder: Path, mixers: dict[str, Any]) -> None:
    """Keep what the mixers started as beside the adapter, or beside each part of a pipeline's."""
    parts = folders(folder)
    if not parts:
        keep_start(folder, mixers)
    for name, part in parts.items():
        own = {path.removeprefix(f"{name}."): M for path, M in mixers.items() if path.startswith(f"{name}.")}
        keep_start(part, own)


def _shipped(run: _Run, task: Task) -> list[Path]:
    """Return where the run's exports lie, the one that the proof loads first."""
    return [run.directory.path / place for place, _ in task.exports.values()]


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _prove_reload(run: _Run, task: Task, adapted: Any) -> None:
    """Compare with another's loader in a fresh process; a fold that fails is not left lying about."""
    from moslora.training.reload_proof import proof as proofs

    directory = run.directory
    inputs = task.probe()
    device = str(adapted.device)
    reader = proofs.READERS[task.reader]
    run.display.say(f"Proving: loading the exported LoRA in a fresh process with {reader.name} only.")
    outputs = proofs.live_logits if task.reader == "peft" else proofs.live_outputs
    live = outputs(task.live(adapted), inputs, device)
    shipped = _shipped(run, task)
    try:
        proof = proofs.prove_reload(
            live,
            inputs,
            task.place,
            proofs.dtype_name(adapted),
            device,
            shipped[0],
            run.display.warn,
            task.auto_class,
            task.quantization,
            task.reader,
            task.variant,
        )
    except ProofError:
        for place in shipped:
            _remove(place)
        raise
    directory.update(proofs={"reload": {**dataclasses.asdict(proof), "passed": proof.passed}})


def _write_answers(run: _Run, before: Sequence[Answer], after: Sequence[Answer]) -> None:
    """Write both models' answers side by side, one JSON object per held-out example."""
    lines: list[dict[str, Any]] = [
        {
            "place": tuned.place,
            "prompt": tuned.prompt,
            "reference": tuned.reference,
            "base": base.text,
            "tuned": tuned.text,
            "base_ok": base.correct,
            "tuned_ok": tuned.correct,
            "kind": tuned.kind,
        }
        for base, tuned in zip(before, after, strict=True)
    ]
    small = _keep_small(run, list(dict.fromkeys(file for answer in after for file in answer.pictures)))
    for line, answer in zip(lines, after, strict=True):
        if answer.pictures:
            line["pictures"] = list(answer.pictures)
            line["thumbnails"] = [small.get(file) for file in answer.pictures]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(run.directory.predictions, text)


def _keep_small(run: _Run, files: Sequence[str]) -> dict[str, str]:
    """Keep small copies of pictures in the run directory, named by what they show, for the report."""
    from moslora.tasks.vision.task import open_image

    kept: dict[str, str] = {}
    for file in files[:SMALL_COPIES]:
        try:
            picture = open_image(Path(file), run.recipe.data.max_pixels)  # type: ignore[attr-defined]
        except ValueError:
            continue  # gone since it was asked about; the report says so
        picture.thumbnail((SMALL, SMALL))
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=85)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        kept[file] = _keep_picture(run, f"{digest[:16]}.webp", buffer.getvalue())
    return kept


def _show_result(run: _Run, task: Task, before: Evaluation, after: Evaluation, display: Display) -> None:
    from moslora.training.reload_proof.proof import READERS

    record = run.directory.read()
    columns = {"base": before, "tuned": after}
    if run.mix is not None:
        start = _measured(run, "start")
        assert start is not None, "a mix is measured before it is trained"
        columns = {"base": before, "weighted sum": start, "mixed": after}
    rows = []
    for key in after.metrics:
        show = "{:.1%}" if key in after.intervals else "{:.4f}"
        rows.append([key.replace("_", " "), *(show.format(e.metrics[key]) for e in columns.values())])
        if key in after.intervals:
            cells = ["{:.1%} to {:.1%}".format(*e.intervals[key]) for e in columns.values()]
            rows.append(["  95 % interval", *cells])
    display.say()
    some = f", {len(after.answers)} of them answered" if 0 < len(after.answers) < after.examples else ""
    display.table(f"{after.examples} {after.unit}{some}", ["", *columns], rows)
    if after.fidelity:
        _show_fidelity(run, before.fidelity, after.fidelity)
    if after.answers:
        _show_samples(_choose(before.answers, after.answers, run.recipe.task.samples), display)
    fold, reload = record["proofs"]["fold"], record["proofs"]["reload"]
    reader = READERS[reload["reader"]]
    display.say(
        f"Proven: fold, largest relative error of ΔW {fold['max_relative_error']:.1e} over {fold['modules']} "
        f"modules; reload in {reader.name}, largest {reader.what} difference {reload['max_logit_difference']:.1e} "
        f"(the adapter moves {reader.what}s by up to {reload['adapter_effect']:.2g}).",
        style="green",
    )
    if "frozen" in record["proofs"]:
        frozen = record["proofs"]["frozen"]
        display.say(
            f"Proven: the {frozen['tensors']} A and B of {frozen['modules']} modules are the sources', bit for bit; "
            f"the mixers moved by up to {frozen['moved']:.0%} of their start.",
            style="green",
        )
    path = run.directory.path
    for place, format_ in task.exports.values():
        what = {"kohya": "For ComfyUI and A1111:       "}.get(format_, "Plain LoRA, loads anywhere:  ")
        display.say(f"{what} {path / place}")
    display.say(f"Native, to train further:     {path / 'adapter'}")
    display.say(f"Report, opens in a browser:   {path / 'report.html'}")


def _show_fidelity(run: _Run, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Show scores of pictures, and which are absent and why."""
    from moslora.tasks.image.fidelity import SCORES

    changes = run.directory.read().get("fidelity", {}).get("change", {})
    rows = []
    for name in SCORES:
        if name in after:
            one, two, change = before[name]["mean"], after[name]["mean"], changes[name]
            ends = " ({:+.3f} to {:+.3f})".format(*change["interval"]) if change["interval"] else ""
            model = f"{after[name]['title']}, {after[name]['model']}"
            rows.append([name, f"{one:.3f}", f"{two:.3f}", f"{change['mean']:+.3f}{ends}", model])
    if rows:
        columns = ["", "base", "tuned", "change, 95 % over prompts", "model"]
        run.display.table("Fidelity: mean cosine", columns, rows)
    for name, why in after.get("absent", {}).items():
        run.display.say(f"{name} is not computed: {why}.")


def _choose(before: Sequence[Answer], after: Sequence[Answer], count: int) -> list[tuple[Answer, Answer]]:
    """Choose examples to show: mostly typical ones, and failures in their share, at least one if any."""
    pairs = list(zip(before, after, strict=True))
    if count <= 0 or not pairs:
        return []
    wrong = [p for p in pairs if p[1].correct is False]
    right = [p for p in pairs if p[1].correct is not False]
    share = min(len(wrong), max(1, round(count * len(wrong) / len(pairs)))) if wrong else 0
    chosen = _spread(right, count - share) + _spread(wrong, share)
    return chosen or _spread(pairs, count)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Take ``count`` items at even distances."""
    if count <= 0 or not items:
        return []
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _show_samples(pairs: Sequence[tuple[Answer, Answer]], display: Display) -> None:
    from rich.text import Text

    marks = {True: ("✓", "green"), False: ("✗", "red"), None: (" ", "")}
    for base, tuned in pairs:
        text = Text()
        text.append(f"{_short(tuned.prompt, 300)}\n", "bold")
        for name, answer in (("base ", base), ("tuned", tuned)):
            mark, style = marks[answer.correct]
            text.append(f"  {name} {mark} ", style)
            text.append(f"{_short(answer.text, 200) or '(nothing)'}\n")
        if tuned.correct is False:
            text.append(f"  right   {_short(tuned.reference, 200)}\n", "dim")
        display.show(text)


def _short(text: str, length: int) -> str:
    """Put a text on one line, cut to ``length`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
