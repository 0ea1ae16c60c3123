"""Learning rates that were tuned elsewhere, so that a comparison need not tune them again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moslora.bounded import read_json
from moslora.comparison.results import Given
from moslora.errors import UsageError
from moslora.files import sha256
from moslora.wording import did_you_mean

__all__ = ["of_methods", "read_rates"]


def read_rates(source: str | Path | Mapping[str, float]) -> Given:
    """Read rates.

    Args:
        source: Rates by method, as a mapping or as ``lora=0.003,moslora=0.009``; or the ``results.json`` of a
            comparison, or its folder.

    Raises:
        UsageError: If it holds no rates, or one is not a positive number.
    """
    if isinstance(source, Mapping):
        return Given(_checked(dict(source), "rates_from"), "given by hand")
    text = str(source)
    path = Path(text).expanduser()
    if "=" in text and not path.exists():
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        names = [name.strip() for name, _, _ in pairs]
        if len(set(names)) != len(names):
            raise UsageError(f"rates_from={text!r} names a method twice.")
        return Given(
            _checked({name.strip(): value.strip() for name, _, value in pairs}, text), "given by hand"
        )
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"rates_from={text!r} is neither METHOD=RATE,METHOD=RATE nor the results.json of a comparison."
        )
    try:
        results = read_json(file)
        methods, earlier = results["methods"], (results.get("given") or {}).get("seeds") or ()
        rates = {one["name"]: one["best_rate"] for one in methods if one["best_rate"] is not None}
        seeds = sorted({*earlier, *(int(point["seed"]) for one in methods for point in one["points"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} holds no results of a comparison: {type(error).__name__}: {error}."
        ) from error
    if not rates:
        raise UsageError(f"{file} has no method with a rate.")
    about = f"{file.parent.name}/{file.name}, tuned on {len(seeds) or 'unknown'} seeds"
    return Given(_checked(rates, str(file)), about, sha256(file), seeds)


def _checked(rates: Mapping[str, Any], source: str) -> dict[str, float]:
    found = {}
    for name, value in rates.items():
        try:
            rate = float(value)
        except (TypeError, ValueError):
            rate = math.nan
        if not name or not 0 < rate < math.inf:
            raise UsageError(
                f"{source}: the rate of {name or 'a method'} is {value!r}, not a positive number."
            )
        found[name] = rate
    return found


def of_methods(given: Given, names: list[str]) -> Given:
    """Return the rates of the methods that are compared.

    Args:
        given: All that was read. A file may have more; what was given by hand may not.
        names: The methods.

    Raises:
        UsageError: If a rate was given by hand for a method that is not compared, or none for any that is.
    """
    strange = [name for name in given.rates if name not in names]
    if strange and given.sha256 is None:
        raise UsageError(
            f"rates_from has a rate of {strange[0]!r}, which is none of the methods compared: {', '.join(names)}."
            f"{did_you_mean(strange[0], names)}"
        )
    kept = {name: given.rates[name] for name in names if name in given.rates}
    if given.rates and not kept:
        raise UsageError(f"rates_from has no rate of the methods compared: {', '.join(names)}.")
    return Given(kept, given.source, given.sha256, given.seeds)
