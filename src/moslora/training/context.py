"""What every stage of a run needs, and the time that stages take."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.distributed import Team, in_main_process
from moslora.recipe.parallel import SPLITS_WEIGHTS
from moslora.recipe.schema import Recipe
from moslora.tasks.task import Task
from moslora.training.mix import Mix
from moslora.training.run_directory import RunDirectory
from moslora.training.start_from import StartingAdapter
from moslora.training.stop import StopRequest

if TYPE_CHECKING:
    from moslora.display import Display


@dataclass
class RunContext:
    """A run in progress: what every stage needs.

    Attributes:
        directory: Where the run is kept.
        recipe: What the user asked for, with the trainer's defaults resolved.
        display: Where progress goes.
        stop: Whether Ctrl-C or SIGTERM came in.
        mix: The adapters whose common mixer is learned, if any.
        team: The processes that train together.
        callbacks: The caller's own callbacks of the trainer.
        start_from: The adapter whose values training starts from, if any.
    """

    directory: RunDirectory
    recipe: Recipe
    display: Display
    stop: StopRequest
    mix: Mix | None = None
    team: Team = field(default_factory=Team)
    callbacks: Sequence[Any] = ()
    start_from: StartingAdapter | None = None
    _inner_seconds: float = 0.0  # of the stages that ended inside the current one
    _stage: str | None = None  # the current stage, in words

    @property
    def is_split(self) -> bool:
        """Whether each process holds a part of the model's weights once training begins."""
        return self.recipe.parallel.kind in SPLITS_WEIGHTS

    def measures(self, task: Task) -> bool:
        """Tell whether this process takes part in measuring.

        Args:
            task: The run's.
        """
        return self.team.is_main_process or task.measures_together

    @property
    def start(self) -> Path:
        """The file that holds the mixers' initial values until the adapter is saved."""
        return self.directory.path / "start.safetensors"

    @contextlib.contextmanager
    def stage(self, name: str, doing: str) -> Iterator[None]:
        """Record a stage and the seconds it took in ``run.json``.

        Seconds of a stage inside it are not counted twice; seconds of earlier attempts of the run are added to.

        Args:
            name: Its key under ``timing``: ``name`` gives ``name_seconds``.
            doing: The stage in words, which ``run.json`` has under ``stage`` while it lasts.
        """
        self.stop.check()
        outer, self._stage = self._stage, doing
        outer_seconds, self._inner_seconds = self._inner_seconds, 0.0
        self.directory.update(stage=doing)
        started = time.monotonic()
        try:
            yield
            if outer is not None:
                self.directory.update(stage=outer)
            self._add_time(name, time.monotonic() - started)
        except BaseException:
            with contextlib.suppress(OSError):  # the disk may be full, and what is under way says more
                self._add_time(name, time.monotonic() - started)
            raise
        finally:
            self._stage, self._inner_seconds = outer, outer_seconds + time.monotonic() - started

    def _add_time(self, name: str, elapsed: float) -> None:
        """Add a stage's seconds, less those of the stages inside it, to what earlier attempts took."""
        if not self.team.is_main_process:
            return  # the others' record is not theirs, and may be out of reach
        earlier = self.directory.read().get("timing", {}).get(f"{name}_seconds", 0.0)
        seconds = round(earlier + elapsed - self._inner_seconds, 3)
        self.directory.update(timing={f"{name}_seconds": seconds})


def only_of_first(display: Display) -> Display:
    """Return the display of the first of several processes, and a silent one in the others."""
    from moslora.display import Display as AnyDisplay

    return display if in_main_process() else AnyDisplay(io.StringIO(), quiet=True)
