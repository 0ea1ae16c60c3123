"""Regular expressions of a configuration, tried within a time limit before anything depends on them.

Python matches by backtracking, and an expression such as ``(a+)+b`` takes the square, or two to the power, of a name's
length. A match cannot be interrupted from within, so expressions that could take long are matched by another process
against the same names first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from moslora.errors import UsageError

__all__ = ["MOST_SECONDS", "check_patterns", "compile_fault"]

# Of a processor, for all expressions on all names, and more where they are very many: a match takes a microsecond.
MOST_SECONDS, SECONDS_OF_A_MATCH = 2.0, 5e-6
MOST_WAITED = 60.0  # seconds, where a busy machine gives that processor time late, or cannot count it
MOST_PATTERNS, MOST_CHARACTERS = 20_000, 2_000_000
LONG = 300  # characters of a name, beyond which any repetition counts as slow

# Arguments that PEFT matches names with, and the whole expressions that it makes of them.
EXPRESSIONS: dict[str, str] = {
    "target_modules": r"(?:{})\Z",
    "exclude_modules": r"(?:{})\Z",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "mixer_pattern": r"(.*\.)?({})$",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
NAMES_IN_LISTS = ("target_modules", "exclude_modules")  # PEFT compares those in lists as they are
QUANTIFIER = re.compile(r"(?<!\()[*+?{]")
RISKY = re.compile(r"\)[*+?{]|\\[1-9]|\(\?P=")

# What the other process runs: it says which expression is next, so that the last one it said is the slow one.
PROGRAM = """
import json, re, signal, sys
job = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_VIRTUAL, job["seconds"])  # of this process; its signal ends it
for number, pattern in enumerate(job["patterns"]):
    print(number, flush=True)
    match = re.compile(pattern).match
    for name in job["names"]:
        match(name)
"""


def compile_fault(pattern: str) -> str | None:
    """Return why a text is not a regular expression; None if it is one."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error) or type(error).__name__
    return None


def check_patterns(
    config: Mapping[str, Any],
    names: Iterable[str],
    where: str = "",
    error: Callable[[str], Exception] = UsageError,
) -> None:
    """Refuse expressions of a configuration that take too long on the names they are for.

    Args:
        config: Arguments of PEFT, as ``target_modules`` and ``rank_pattern``.
        names: Names of modules that they are matched with.
        where: What opens the message, such as the configuration's file.
        error: Makes what is raised.

    Raises:
        Exception: As ``error`` makes it, with the argument and what to do.
    """
    arguments = list(_expressions(config))
    start = f"{where}: " if where else ""
    if len(arguments) > MOST_PATTERNS or sum(len(text) for _, text in arguments) > MOST_CHARACTERS:
        raise error(
            f"{start}its arguments have {len(arguments)} patterns of names, more than can be matched ({MOST_PATTERNS}, "
            f"of {MOST_CHARACTERS} characters in all). Name modules by what they have in common."
        )
    names = list(dict.fromkeys(names))
    is_long = any(len(name) > LONG for name in names)
    # What is no expression at all is refused where it is read.
    slow = [(a, text) for a, text in arguments if _may_be_slow(text, is_long) and compile_fault(text) is None]
    if not slow or not names:
        return
    patterns = [EXPRESSIONS[argument].replace("{}", text) for argument, text in slow]
    number = _first_slow(patterns, names)
    if number is None:
        return
    argument, text = slow[number]
    shown = text if len(text) <= 60 else text[:59] + "…"
    raise error(
        f"{start}{argument} has the regular expression {shown!r}, which takes more than "
        f"{MOST_SECONDS:g} s on {len(names)} names of modules. Write it without repetitions inside repetitions, or "
        "name the modules in a list."
    )


def _expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield arguments and the expressions in them."""
    for argument in EXPRESSIONS:
        value = config.get(argument)
        if isinstance(value, str):
            yield argument, value
        elif argument not in NAMES_IN_LISTS and isinstance(value, Mapping | list | tuple | set):
            yield from ((argument, item) for item in value if isinstance(item, str))


def _may_be_slow(text: str, is_long: bool) -> bool:
    """Return whether an expression could take long: not one with two plain repetitions, on names of usual length."""
    count = len(QUANTIFIER.findall(text))
    return count > 2 or (count > 0 and is_long) or RISKY.search(text) is not None


def _first_slow(patterns: list[str], names: list[str]) -> int | None:
    """Return the number of the expression at which another process ran out of time; None if it came to the end."""
    seconds = MOST_SECONDS + SECONDS_OF_A_MATCH * len(patterns) * len(names)
    job = json.dumps({"patterns": patterns, "names": names, "seconds": seconds})
    command = [sys.executable, "-I", "-S", "-c", PROGRAM]
    try:
        done = subprocess.run(
            command, input=job, capture_output=True, text=True, timeout=MOST_WAITED, check=False
        )
        output, ended = done.stdout, done.returncode == 0
    except subprocess.TimeoutExpired as late:
        said = late.stdout or ""
        output, ended = said.decode() if isinstance(said, bytes) else said, False
    except OSError:
        return None  # no process can be started here; the expressions are taken as they are
    lines = output.split()
    return None if ended or not lines else int(lines[-1])
