"""A finished run, as Python sees it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.display import Display, Printable
from moslora.training.run_directory import RunDirectory
from moslora.training.summary import show_costs, show_measurements, show_proofs

__all__ = ["Run"]


@dataclass(frozen=True, repr=False)
class Run(Printable):
    """A run directory, read.

    Attributes:
        path: The directory.
    """

    path: Path

    @property
    def record(self) -> dict[str, Any]:
        """``run.json``: status, versions, hardware, seed, hashes, timings, metrics and proofs."""
        return RunDirectory(self.path).read()

    @property
    def metrics(self) -> dict[str, Any]:
        """Held-out measurements: those of the base under ``"before"``, of the tuned model under ``"after"``.

        Also ``"intervals"`` (95 %), by the same names, and ``"examples"``, how many were measured.
        """
        return dict(self.record["metrics"])

    @property
    def also(self) -> dict[str, Any]:
        """What tuning cost on the data of ``evaluation.also``, by the name of each set; empty if it was not measured.

        ``run.also["general"]["after"]`` has ``"loss"`` and ``"kl"`` (from the base), in nats a token; ``"change"`` has
        their 95 % intervals over passages.
        """
        return dict(self.record.get("also", {}))

    @property
    def proofs(self) -> dict[str, Any]:
        """What was proven, with its numbers: ``"fold"`` and ``"reload"``."""
        return dict(self.record["proofs"])

    @property
    def adapter(self) -> Path:
        """The native adapter, to train further."""
        return RunDirectory(self.path).adapter

    @property
    def lora(self) -> Path:
        """The plain LoRA, which loads anywhere."""
        return RunDirectory(self.path).lora

    @property
    def report(self) -> Path:
        """The page that shows the run; it opens offline."""
        return RunDirectory(self.path).report

    @property
    def history(self) -> list[dict[str, Any]]:
        """What the trainer logged, one dict per step that it logged at."""
        return _read_lines(RunDirectory(self.path).metrics)

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Held-out examples with both models' answers: ``prompt``, ``reference``, ``base`` and ``tuned``, and more."""
        return _read_lines(RunDirectory(self.path).predictions)

    def show(self, display: Display) -> None:
        """Write measurements, proofs, and where everything is."""
        record = self.record
        if record.get("status") != "completed":
            display.say(f"{self.path}: {record.get('status')}, {record.get('stage')}.")
            return
        names = ("start", "tuned") if record.get("start_from") else ()
        show_measurements(record["metrics"], display, *names)
        show_costs(record.get("also", {}), display)
        show_proofs(record["proofs"], display)
        display.say(f"Plain LoRA, loads anywhere:   {self.lora}")
        display.say(f"Native, to train further:     {self.adapter}")
        display.say(f"Report, opens in a browser:   {self.report}")

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"run": str(self.path), **self.record}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file; empty if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
