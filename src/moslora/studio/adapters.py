"""Adapters on the page: found, looked over, exported, joined, and packed to be downloaded."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moslora.adapters.formats.table import FORMATS, WRITTEN
from moslora.adapters.targets import TARGETS
from moslora.api.adapters import combine, doctor, export, import_adapter, inspect, merge
from moslora.display import Display
from moslora.errors import UsageError
from moslora.files import scratch
from moslora.reports.inspection import write_page
from moslora.studio.jobs import Job
from moslora.studio.recipes import Recipes

__all__ = ["Adapters"]


class Adapters:
    """Adapters of a workspace.

    Args:
        recipes: Its recipes.
    """

    def __init__(self, recipes: Recipes) -> None:
        self.recipes = recipes
        self.workspace = recipes.workspace
        self.library = recipes.library

    @staticmethod
    def engines() -> list[str]:
        """Return the programs that the doctor knows."""
        return list(TARGETS)

    @staticmethod
    def formats() -> list[tuple[str, str]]:
        """Return formats that are written: what each is for, and its name."""
        return [(f"{name}: {FORMATS[name].purpose}", name) for name in WRITTEN]

    def names(self) -> list[str]:
        """Return the adapters there are, those of the newest runs first."""
        found = set(self.library.find().adapters)
        runs = [state.path / part for state in self.library.runs() for part in ("lora", "adapter")]
        ordered = [path for path in runs if path in found]
        rest = sorted(found.difference(ordered))
        return [self.workspace.shown(path) for path in (*ordered, *rest)]

    def _base(self, name: str) -> str | None:
        """Return a base as verbs take it: a folder of the workspace, or a name."""
        if not name.strip():
            return None
        is_path = (self.workspace.root / name).exists() or name.startswith(("/", "~", "."))
        return str(self.workspace.find(name)) if is_path else name.strip()

    def examine(self, name: str, base: str, engines: Sequence[str], display: Display) -> Any:
        """Look an adapter over, as ``moslora doctor``.

        Args:
            name: Of the adapter.
            base: Of the base; empty for none.
            engines: Programs that will run it.
            display: Where to tell of it.
        """
        return doctor(self.workspace.find(name), self._base(base), engines, progress=display)

    def heat_maps(self, name: str, base: str, display: Display) -> str:
        """Return the page of ``moslora inspect --html``.

        Args:
            name: Of the adapter.
            base: Of the base; empty for none.
            display: Where to tell of it.
        """
        inspection = inspect(self.workspace.find(name), self._base(base), progress=display)
        with scratch("moslora-studio") as folder:
            write_page(inspection, folder / "page.html")
            return (folder / "page.html").read_text(encoding="utf-8")

    def export(self, name: str, to: str, out: str, rank: int | None, dtype: str | None, base: str) -> Any:
        """Write an adapter in another format, proven.

        Args:
            name: Of the adapter.
            to: Format.
            out: Name of what is written; empty for one made of these.
            rank, dtype: As for ``moslora.export``.
            base: Of the base; empty for what the adapter names.
        """
        suffix = FORMATS[to].suffix or ""
        source = self.workspace.find(name)
        wanted = out.strip() or f"{self._stem(source)}-{to}"
        if suffix and not wanted.endswith(suffix):
            wanted += suffix
        return export(source, self._out(wanted), to, rank=rank, dtype=dtype or None, base=self._base(base))

    def take_in(self, name: str, out: str, alpha: str) -> Any:
        """Read an adapter of another program and write it natively, as ``moslora import``.

        Args:
            name: Of the file or folder.
            out: Name of what is written.
            alpha: The ``lora_alpha`` of its training, where the file does not say it; else empty.
        """
        source = self.workspace.find(name)
        number = _numbers(alpha, 1)
        place = self._out(out.strip() or f"{self._stem(source)}-native")
        return import_adapter(source, place, alpha=None if number is None else number[0])

    def merge(self, name: str, base: str, out: str, display: Display) -> Any:
        """Merge an adapter into the weights of its base.

        Args:
            name: Of the adapter.
            base: Of the base.
            out: Name of what is written.
            display: Where to tell of it.
        """
        source = self.workspace.find(name)
        chosen = self._base(base) or self._named_base(source)
        if chosen is None:
            raise UsageError(f"{name} does not name its base. Name it under Base model.")
        return merge(
            chosen, source, self._out(out.strip() or f"{self._stem(source)}-merged"), progress=display
        )

    def _named_base(self, path: Path) -> str | None:
        from moslora.studio.runs import read_record

        named = read_record(path / "adapter_config.json").get("base_model_name_or_path")
        return self._base(named) if isinstance(named, str) else None

    def combine(self, names: Sequence[str], weights: str, out: str) -> Any:
        """Write the weighted sum of adapters.

        Args:
            names: Of the adapters.
            weights: Numbers separated by commas; empty for 1 each.
            out: Name of what is written.
        """
        paths = [self.workspace.find(name) for name in names]
        if len(paths) < 2:
            raise UsageError("Choose two adapters or more to add up.")
        return combine(paths, self._out(out.strip() or "combined"), _numbers(weights, len(paths)))

    def mix(self, names: Sequence[str], weights: str, text: str) -> Job:
        """Start learning a mixer over adapters, in a process of its own.

        Args:
            names: Of the adapters.
            weights: Where the mixer starts, as for ``combine``.
            text: The recipe with base and examples, YAML.
        """
        paths = [str(self.workspace.find(name)) for name in names]
        if len(paths) < 2:
            raise UsageError("Choose two adapters or more to mix.")
        numbers = _numbers(weights, len(paths))
        file = self.recipes.write(self.recipes.check(text), "mix")
        more = ["--weights", ",".join(f"{number:g}" for number in numbers)] if numbers else []
        return self.recipes.jobs.start("mix adapters", ["mix", *paths, "--recipe", str(file), *more])

    def pack(self, name: str, folder: Path) -> Path:
        """Return one file with an adapter in it, to be downloaded.

        Args:
            name: Of the adapter.
            folder: Where to pack it.
        """
        source = self.workspace.find(name)
        if source.is_file():
            return source
        if not source.is_dir():
            raise UsageError(f"There is no adapter {name} any more.")
        target = folder / f"{self._stem(source)}.zip"
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(source.rglob("*")):
                if file.is_file() and self.workspace.holds(file):
                    archive.write(file, Path(self._stem(source)) / file.relative_to(source))
        return target

    def _out(self, name: str) -> Path:
        folder = self.workspace.root / "exports"
        folder.mkdir(exist_ok=True)
        if "/" in name or "\\" in name or name.startswith("."):
            raise UsageError(f"{name!r} is not a plain name; what is written goes into exports/.")
        return self.workspace.new(f"exports/{name}")

    def _stem(self, path: Path) -> str:
        own = path.stem if path.is_file() else path.name
        is_of_run = (path.parent / "run.json").is_file()
        return f"{path.parent.name}-{own}" if is_of_run else own


def _numbers(text: str, count: int) -> list[float] | None:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"{text} is not a list of weights, such as 1, 0.5.") from None
    if numbers and len(numbers) != count:
        raise UsageError(
            f"{len(numbers)} weights are given for {count} adapters; give one for each, or none."
        )
    return numbers or None
