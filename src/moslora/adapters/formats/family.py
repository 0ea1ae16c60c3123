"""A family of models as a table: the names of its modules in several programs, and their sizes to each other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

__all__ = ["Entry", "Family", "Fit", "Module"]

ANY = "*"


@dataclass(frozen=True)
class Module:
    """A module that a file adapts.

    Attributes:
        path: Its path.
        is_flat: Whether the path has underscores for dots.
        inputs, outputs: Columns of A and rows of B.
    """

    path: str
    is_flat: bool
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Entry:
    """A name that a kind of module has in some program.

    Attributes:
        source: Path with ``#`` for indices.
        targets: Paths in diffusers that its rows go to, one after the other, and the outputs of each.
        inputs, outputs: Sizes: multiples of the hidden size, ``6|9`` for either; a letter for one size in all blocks;
            or ``*`` for any.
        swaps: Whether the halves of its rows are in the other order in diffusers.
    """

    source: str
    targets: tuple[tuple[str, str], ...]
    inputs: str
    outputs: str
    swaps: bool = False


@dataclass(frozen=True)
class Fit:
    """How a family takes the modules of a file.

    Attributes:
        unknown: Modules whose names it does not have.
        misfit: The first module whose size is not that of its name, as a sentence; empty if all fit.
        hidden: The hidden size; None where no module tells it.
        entries: By module, the name that it fits, and the indices in it.
    """

    unknown: tuple[Module, ...]
    misfit: str
    hidden: int | None
    entries: Mapping[Module, tuple[Entry, tuple[str, ...]]]

    @property
    def fits(self) -> bool:
        """Whether every module has a name and a size of the family."""
        return not self.unknown and not self.misfit


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: What people call it.
        modules: In diffusers' names, a line each: path, inputs, outputs; ``#`` is an index, ``{a,b}`` either.
        original: Names of other programs, a line each: ``NAME = PATH``; ``BLOCK.[A B C]`` for rows that go one after
            the other to these modules; ``NAME ~ PATH`` where scale and shift are in the other order; ``: SIZE`` at its
            end where modules of that size are meant. Alternatives in braces belong together by their order.
        loader: The class of diffusers that loads its LoRA files; empty where its pipeline loads none.
        encoders: Of which text encoders that loads a LoRA.
        t5: Which of its models is the T5, which trainers call the third text encoder.
        in_comfyui: Whether ComfyUI's table has diffusers' names of it, as far as it was looked up.
        classes: Its transformers in diffusers, as PEFT notes them in an adapter's configuration.
        native: Modules whose names are the same in the code it was published with, a line each; ``*`` for all. None
            where original names are not written.
        is_split: Whether readers look for diffusers' names behind ``diffusion_model.`` too, fused projections apart,
            as ai-toolkit writes them. Flat names are the original's always.
        converted: Which formats in original names its loader reads: ``"original"``, ``"kohya"``.
    """

    name: str
    modules: str = field(repr=False)
    original: str = field(default="", repr=False)
    loader: str = ""
    encoders: tuple[str, ...] = ()
    t5: str = ""
    in_comfyui: bool = False
    classes: tuple[str, ...] = ()
    native: str | None = field(default=None, repr=False)
    is_split: bool = False
    converted: tuple[str, ...] = ()

    @cached_property
    def native_paths(self) -> frozenset[str]:
        """Paths of ``native``, one for each."""
        return frozenset(_lines(self.native or ""))

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every name that its modules have, diffusers' first."""
        own = {}
        for line in _lines(self.modules):
            path, inputs, outputs = line.split()
            own[path] = Entry(path, ((path, outputs),), inputs, outputs)
        return (*own.values(), *(_renamed(line, own) for line in _lines(self.original)))

    @cached_property
    def _patterns(self) -> dict[tuple[bool, str], list[tuple[re.Pattern[str], Entry]]]:
        """How names are written, by whether they have underscores and by the name without its digits."""
        found: dict[tuple[bool, str], list[tuple[re.Pattern[str], Entry]]] = {}
        for is_flat in (False, True):
            for entry in self.entries:
                source = entry.source.replace(".", "_") if is_flat else entry.source
                pattern = re.compile(re.escape(source).replace(r"\#", r"(\d+)"))
                found.setdefault((is_flat, _masked(source)), []).append((pattern, entry))
        return found

    def names(self, path: str, is_flat: bool) -> list[tuple[Entry, tuple[str, ...]]]:
        """Return what a path may stand for, and the indices in it.

        Args:
            path: Of a module.
            is_flat: Whether it has underscores for dots.

        Returns:
            Entries that have this name; several where their sizes differ.
        """
        known = self._patterns.get((is_flat, _masked(path)), ())
        found = [(pattern.fullmatch(path), entry) for pattern, entry in known]
        return [(entry, match.groups()) for match, entry in found if match]

    def fit(self, modules: Sequence[Module]) -> Fit:
        """Hold modules against the table.

        Args:
            modules: Of one file.

        Returns:
            Which of them it has, and whether their sizes are its own.
        """
        named = {module: self.names(module.path, module.is_flat) for module in modules}
        unknown = tuple(module for module, entries in named.items() if not entries)
        hidden: set[int] | None = None
        for module, entries in named.items():
            possible = [_hidden(entry, module) for entry, _ in entries]
            if not possible or None in possible:
                continue
            own = set().union(*(sizes or set() for sizes in possible))
            both = own if hidden is None else hidden & own
            if not both:
                return Fit(unknown, _misfit(self.name, module, entries[0][0], hidden), None, {})
            hidden = both
        size = min(hidden) if hidden else None
        chosen = {module: _choose(entries, module, size) for module, entries in named.items() if entries}
        letters: dict[str, int] = {}
        for module, (entry, _) in chosen.items():
            for token, dim in ((entry.inputs, module.inputs), (entry.outputs, module.outputs)):
                if token.isalpha() and letters.setdefault(token, dim) != dim:
                    return Fit(unknown, _misfit(self.name, module, entry, None), None, {})
        return Fit(unknown, "", size, chosen)


def _masked(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _lines(table: str) -> list[str]:
    """Expand ``{a,b}``: in a table of modules each with each, in a table of names the first with the first."""
    lines = []
    for line in filter(None, map(str.strip, table.splitlines())):
        parts = re.split(r"\{([^}]*)\}", line)
        choices = [part.split(",") if n % 2 else [part] for n, part in enumerate(parts)]
        if " = " in line or " ~ " in line:
            count = max(map(len, choices))
            lines += ["".join(own[n % len(own)] for own in choices) for n in range(count)]
        else:
            lines += ["".join(chosen) for chosen in itertools.product(*choices)]
    return lines


def _renamed(line: str, own: Mapping[str, Entry]) -> Entry:
    """Read a line of another program's names."""
    rule, _, size = (part.strip() for part in line.partition(" : "))
    source, mark, targets = rule.partition(" ~ " if " ~ " in rule else " = ")
    fused = re.fullmatch(r"(.*)\[(.*)\]", targets)
    paths = [f"{fused[1]}{name}" for name in fused[2].split()] if fused else [targets]
    shares = [own[path].outputs for path in paths]
    outputs = size or (shares[0] if len(shares) == 1 else str(sum(map(Fraction, shares))))
    return Entry(source, tuple(zip(paths, shares, strict=True)), own[paths[0]].inputs, outputs, mark == " ~ ")


def _hidden(entry: Entry, module: Module) -> set[int] | None:
    """Return which hidden sizes a module may be of; None if it does not tell."""
    found: set[int] | None = None
    for token, dim in ((entry.inputs, module.inputs), (entry.outputs, module.outputs)):
        if token == ANY or token.isalpha():
            continue
        sizes = [dim / Fraction(part) for part in token.split("|")]
        own = {int(size) for size in sizes if size.denominator == 1}
        found = own if found is None else found & own
    return found


def _choose(
    entries: list[tuple[Entry, tuple[str, ...]]], module: Module, hidden: int | None
) -> tuple[Entry, tuple[str, ...]]:
    """Return the entry of a name whose size it is."""
    sizes = [(pair, _hidden(pair[0], module)) for pair in entries]
    return next((pair for pair, own in sizes if own is None or hidden in own), entries[0])


def _misfit(name: str, module: Module, entry: Entry, hidden: set[int] | None) -> str:
    here = f", which by other modules of the file is {min(hidden)}" if hidden else ""
    return (
        f"{module.path} has {module.inputs} inputs and {module.outputs} outputs, and {name} has "
        f"{_size(entry.inputs)} and {_size(entry.outputs)} there{here}"
    )


def _size(token: str) -> str:
    if token == ANY or token.isalpha():
        return "any number of"
    return f"{token.replace('|', ' or ')} × its hidden size"
