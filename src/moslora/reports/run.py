"""The report of a run: one HTML file that opens offline, made only from what the run left on disk.

It reads ``run.json``, and ``metrics.jsonl``, ``predictions.jsonl`` and ``recipe.yaml`` where they are: even
an interrupted or failed run has a report. The verdict comes first, the evidence below it, and the tuned
model's mistakes stand beside its successes.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moslora.files import write_text
from moslora.metrics.answers import wilson_interval
from moslora.tasks.image.fidelity import SCORES
from moslora.training.metrics_log import read_metrics
from moslora.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["INKS", "drawing", "loss_curve", "sign_test", "write_report"]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: as a share of the examples or as a number, and which way is up."""

    label: str
    form: Literal["number", "share"] = "number"
    better: Literal["higher", "lower", "unknown"] = "unknown"


METRICS = {
    "loss": Metric("Held-out loss", "number", "lower"),
    "perplexity": Metric("Perplexity", "number", "lower"),
    "exact_match": Metric("Exact match", "share", "higher"),
    "accuracy": Metric("Accuracy", "share", "higher"),
    "accuracy_shuffled_images": Metric("Accuracy with images shuffled", "share", "unknown"),
    "valid_json": Metric("Valid JSON", "share", "higher"),
}

# Proof in run.json: the field that holds its number, and what the number says.
PROOFS = {
    "fold": ("max_relative_error", "The fold keeps ΔW: largest relative error over all modules, in float64"),
    "reload": (
        "max_logit_difference",
        "A fresh process with stock PEFT gives the same logits: largest difference on held-out prompts",
    ),
    "reload in diffusers": (
        "max_logit_difference",
        "A fresh process with diffusers gives the same outputs: largest difference on noised pictures",
    ),
    "kohya": (
        "max_relative_error",
        "The file for ComfyUI and A1111 keeps ΔW: largest relative error over all modules, in float64",
    ),
}

FILES = {
    "lora": "plain LoRA, loads anywhere",
    "kohya.safetensors": "the same for ComfyUI, A1111 and sd-scripts",
    "adapter": "native MoSLoRA, to continue training",
    "pictures": "what base, tuned model and the model on the way made of prompts, or what questions are about, small",
    "checkpoints": "to resume from",
    "recipe.yaml": "the recipe with every default written out",
    "run.json": "this report's figures, for programs",
    "metrics.jsonl": "one line per logged step",
    "predictions.jsonl": "every held-out answer, base and tuned",
}

# How an answer changed, with how many examples are shown. The mistakes come right after the successes.
CHANGES = {
    (False, True): ("Fixed by tuning", 4),
    (True, False): ("Broken by tuning", 4),
    (False, False): ("Still wrong", 4),
    (True, True): ("Right before and after", 2),
}

PREDICTION = ("place", "prompt", "reference", "base", "tuned", "base_ok", "tuned_ok", "kind", "thumbnails")

# Colours of the plot are placeholders for CSS variables, so that one drawing serves light and dark.
INKS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--train)",
    "#050505": "var(--held-out)",
}
INK, MUTED, LINE, TRAIN, HELD_OUT = INKS
PLOT_POINTS = 600  # more than a screen shows; beyond that neighbours are averaged
CLIP = 1500  # characters of one prompt or answer
THUMBNAIL = 320  # pixels; the pictures themselves lie beside the report
# Of pictures that questions are about: how many are shown of one example, and bytes of one and of all in a page.
SEEN, SEEN_BYTES, ALL_SEEN_BYTES = 4, 100_000, 2_000_000
SERIES = 8  # steps on the way that are shown; the others lie beside the report
SERIES_THUMBNAIL = 224
# What was measured, unless a run says otherwise.
UNIT = "held-out examples"


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` of a run, replacing an older one.

    Args:
        run_dir: The run's folder.

    Returns:
        Path of the report. The same files in give the same bytes out.

    Raises:
        FileNotFoundError: If ``run_dir`` is not a run.
        ValueError: If one of the run's files is damaged; names file and line.
    """
    import jinja2

    run = RunDirectory.open(run_dir)
    record = run.read()
    log = read_metrics(run.metrics) if run.metrics.exists() else []
    predictions = read_metrics(run.predictions) if run.predictions.exists() else []
    metrics = _section(record, "metrics")
    rows = _metric_rows(metrics, predictions)
    count = metrics.get("examples") or len(predictions)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clipped"] = _clipped
    page = environment.get_template("run.html.jinja").render(
        name=record.get("name") or run.path.resolve().name,
        status=record.get("status", "unknown"),
        stage=record.get("stage"),
        error=record.get("error"),
        run_path=str(run_dir),
        last_step=max((line.get("step", 0) for line in log), default=0),
        verdict=_verdict(rows, count, len(predictions), metrics.get("unit") or UNIT),
        unit=metrics.get("unit") or UNIT,
        pictures=_pictures(run, _section(record, "pictures")),
        fidelity=_fidelity(_section(record, "fidelity")),
        drawn_steps=len(_section(_section(record, "pictures"), "during")),
        shown_steps=SERIES,
        chance=_chance(predictions),
        count=count,
        answered=len(predictions),
        glance=_glance(record),
        curves=[loss_curve(log, metrics, width) for width in (7.2, 4.0)] if _has_curve(log) else [],
        diverged=[line.get("step") for line in log if "loss" in line.get("not_finite", [])],
        rows=rows,
        kinds=_kind_rows(predictions),
        changes=_with_pictures(run, _changes(predictions)),
        proofs=[_proof(name, proof) for name, proof in _section(record, "proofs").items()],
        files=_files(run),
        snippet=_snippet(run, record) if run.lora.is_dir() else None,
        recipe=run.recipe.read_text(encoding="utf-8") if run.recipe.exists() else None,
        details={
            title: list(_flat(_section(record, title.lower())))
            for title in ("Timing", "Versions", "Hardware", "Hashes")
        },
    )
    write_text(run.report, page)
    return run.report


def sign_test(fixed: int, broken: int) -> float:
    """Return the two-sided p-value of ``fixed`` against ``broken`` (McNemar's exact test).

    Examples that were right or wrong both times say nothing about a change and are not counted.

    Args:
        fixed: Examples that went from wrong to right.
        broken: Examples that went from right to wrong.

    Returns:
        Probability, in (0, 1], of a split at least this uneven if both were equally likely.

    Example:
        >>> sign_test(5, 1)
        0.21875
    """
    changed = fixed + broken
    tail = sum(math.comb(changed, k) for k in range(min(fixed, broken) + 1))
    return min(1.0, float(2 * tail / 2**changed))


def loss_curve(log: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], width: float) -> str:
    """Draw losses over steps with the learning rate below, as an SVG element to put into a page.

    Args:
        log: Lines of ``metrics.jsonl``; those without a finite ``loss`` or ``eval_loss`` are passed over.
        metrics: ``metrics`` of ``run.json``, for the held-out loss before and after.
        width: In inches; text keeps its size, so that a narrow drawing serves a phone.

    Returns:
        An ``<svg>`` element, coloured by the page's CSS variables; equal input gives equal text.
    """
    train, held_out, rates = (_series(log, key) for key in ("loss", "eval_loss", "learning_rate"))
    before, after = (_number(_section(metrics, phase).get("loss")) for phase in ("before", "after"))
    last = max((line.get("step", 0) for line in log), default=0)
    held_out = [point for point in held_out if 0 < point[0] < last]
    if before is not None:
        held_out.insert(0, (0, before))
    if after is not None:
        held_out.append((last, after))

    is_held_out = str(metrics.get("unit") or UNIT).startswith("held-out")

    def paint(figure: Figure) -> None:
        ratios = {"height_ratios": [4, 1]} if rates else {}
        axes = figure.subplots(2 if rates else 1, 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
        _draw_losses(axes[0], train, held_out, "held-out" if is_held_out else "measured")
        if rates:
            axes[1].plot(*zip(*_thinned(rates), strict=True), color=MUTED, linewidth=1.2)
            axes[1].set_ylabel("learning\nrate")
            axes[1].set_ylim(bottom=0)
            axes[1].locator_params(axis="y", nbins=2)
            axes[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes[-1].set_xlabel("step")
        axes[-1].locator_params(axis="x", integer=True, nbins=6)

    return drawing("Loss by training step", (width, 4.2), paint, name=f"moslora-{width}")


def drawing(
    description: str, size: tuple[float, float], paint: Callable[[Figure], None], name: str | None = None
) -> str:
    """Draw an SVG element to put into a page, coloured by the page's CSS variables.

    Args:
        description: What it shows, for who cannot see it.
        size: Width and height in inches.
        paint: Draws on matplotlib's figure, in ``INKS``.
        name: Of this drawing among those of a page; the description by default.

    Returns:
        An ``<svg>`` element; equal input gives equal text.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name or description,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": LINE,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change a report
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _as_element(buffer.getvalue(), description)


def _draw_losses(
    axes: Axes, train: list[tuple[int, float]], held_out: list[tuple[int, float]], label_of_dots: str
) -> None:
    values = [value for _, value in train + held_out]
    # A loss that falls 30-fold is a flat line on a linear axis for most of its way.
    logarithmic = min(values) > 0 and max(values) / min(values) > 30
    axes.set_yscale("log" if logarithmic else "linear")
    axes.set_ylabel("loss (log scale)" if logarithmic else "loss")
    axes.grid(axis="y", linewidth=0.8)
    smooth = len(train) >= 20
    if train:
        steps, losses = zip(*_thinned(train), strict=True)
        alpha, label = (0.35, None) if smooth else (1.0, "training")
        axes.plot(steps, losses, color=TRAIN, alpha=alpha, linewidth=1.0, label=label)
    if smooth:
        steps, losses = zip(*_thinned(_smoothed(train)), strict=True)
        axes.plot(steps, losses, color=TRAIN, linewidth=2.0, label="training (smoothed)")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        # Two points far apart joined by a line would claim a course that nobody measured.
        joined = ":" if len(held_out) > 2 else "none"
        dots: dict[str, Any] = {"color": HELD_OUT, "linestyle": joined, "marker": "o", "markersize": 6}
        axes.plot(steps, losses, label=label_of_dots, clip_on=False, zorder=5, **dots)
        for step, loss in {held_out[0], held_out[-1]}:
            right = step > steps[0]
            axes.annotate(
                _figure(loss),
                (step, loss),
                textcoords="offset points",
                xytext=(-4 if right else 8, 8),
                ha="right" if right else "left",
                color=HELD_OUT,
            )
    axes.legend(frameon=False, loc="upper right")


def _as_element(document: str, description: str) -> str:
    """Strip what only a file of its own needs, and let CSS choose the colours and the typeface.

    Args:
        document: An SVG file as matplotlib writes it, drawn in ``INKS``.
        description: What it shows, for who cannot see it.

    Returns:
        An ``<svg>`` element to put into a page.
    """
    element = document[document.index("<svg") :].strip()
    element = re.sub(r"\s*<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    opening, rest = element.split(">", 1)
    opening = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", opening)
    element = f"{opening}>{rest}"
    for placeholder, ink in INKS.items():
        element = element.replace(placeholder, ink)
    element = element.replace("'DejaVu Sans'", "system-ui, sans-serif")
    # Both drawings stand in one page, where an identifier may stand once.
    element = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if f"#{found[1]}" in element else "", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def _series(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    points = ((line.get("step"), _number(line.get(key))) for line in log)
    return [(step, value) for step, value in points if isinstance(step, int) and value is not None]


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return means over a tenth of the run around each point; means over the past would lag behind."""
    reach = len(points) // 20
    smoothed = []
    for index, (step, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)  # as far to the left as to the right
        window = points[index - near : index + near + 1]
        smoothed.append((step, sum(value for _, value in window) / len(window)))
    return smoothed


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    stride = math.ceil(len(points) / PLOT_POINTS)
    groups = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _has_curve(log: Sequence[Mapping[str, Any]]) -> bool:
    return bool(_series(log, "loss") or _series(log, "eval_loss"))


def _metric_rows(
    metrics: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    before, after = _section(metrics, "before"), _section(metrics, "after")
    intervals = _section(metrics, "intervals")
    rows = []
    for key in {**before, **after}:
        metric = METRICS.get(key, Metric(key.replace("_", " ").capitalize()))
        values = {"before": _number(before.get(key)), "after": _number(after.get(key))}
        label = metric.label
        unit = str(metrics.get("unit") or UNIT)
        if key == "loss" and not unit.startswith("held-out"):
            label = f"Loss on {unit}"
        row: dict[str, Any] = {"key": key, "label": label, "form": metric.form, "change": None}
        for phase, value in values.items():
            given = _section(intervals, phase).get(key)
            interval = given if given else _counted_interval(value, phase, metric, predictions)
            row[phase] = _shown(value, metric)
            row[f"{phase}_interval"] = _shown_interval(interval, metric) if interval else None
        if values["before"] is not None and values["after"] is not None:
            difference = values["after"] - values["before"]
            sign = "+" if difference > 0 else "−" if difference < 0 else "±"
            size = abs(difference)
            row["change"] = sign + (f"{_percent(size)} points" if metric.form == "share" else _figure(size))
            improved = difference > 0 if metric.better == "higher" else difference < 0
            judged = metric.better != "unknown" and difference != 0
            row["direction"] = ("better" if improved else "worse") if judged else ""
        rows.append(row)
    return rows


def _counted_interval(
    value: float | None, phase: str, metric: Metric, predictions: Sequence[Mapping[str, Any]]
) -> tuple[float, float] | None:
    """Return the interval of a share that the right-or-wrong marks of the predictions add up to."""
    marks = _marks(predictions, "base_ok" if phase == "before" else "tuned_ok")
    if value is None or metric.form != "share" or not marks:
        return None
    return wilson_interval(sum(marks), len(marks)) if abs(sum(marks) / len(marks) - value) < 1e-9 else None


def _marks(predictions: Sequence[Mapping[str, Any]], key: str) -> list[bool]:
    return [mark for line in predictions if isinstance(mark := line.get(key), bool)]


def _pictures(run: RunDirectory, pictures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what base and tuned model drew, and the model on the way, by prompt and seed.

    Each is small, as a data URI; None where one is missing.
    """
    before, after = (pictures.get(stage) or [] for stage in ("before", "after"))
    during = _section(pictures, "during")
    steps = _spread(sorted(int(step) for step in during), SERIES)
    stages = [("base", before), *((f"step {step}", during[str(step)]) for step in steps), ("tuned", after)]
    size = THUMBNAIL if not steps else SERIES_THUMBNAIL
    rows = []
    for number, shown in enumerate(before):
        files = [(who, found[number].get("file") if number < len(found) else None) for who, found in stages]
        cells = [(who, _thumbnail(run, file, size)) for who, file in files]
        rows.append({"prompt": shown.get("prompt"), "seed": shown.get("seed"), "cells": cells})
    return rows


def _fidelity(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return scores of pictures, base and tuned side by side, with what they are means of; and what is absent."""
    before, after, change = (_section(found, stage) for stage in ("before", "after", "change"))
    rows, tables = [], []
    for name, score in SCORES.items():
        one, two, moved = (_section(stage, name) for stage in (before, after, change))
        about = one or two
        if not about:
            continue
        count = len(about.get("prompts", ()))
        real = len(about.get("real", ()))
        rows.append(
            {
                "name": name,
                "base": _cosine(one.get("mean"), one.get("interval")),
                "tuned": _cosine(two.get("mean"), two.get("interval")),
                "change": _cosine(moved.get("mean"), moved.get("interval"), signed=True),
                "of": f"{about.get('pictures')} pictures of {count} prompts"
                + (f", each with {real} real ones" if real else ", each with its prompt"),
                "model": f"{about.get('title')}, {about.get('model')}",
                "published": None if about.get("title") == score.published else score.published,
            }
        )
        for key, field, title in (("prompts", "prompt", "by prompt"), ("real", "picture", "by real picture")):
            tuned = {line[field]: line["mean"] for line in two.get(key, ())}
            lines = [
                (line[field], _cosine(line["mean"])[0], _cosine(tuned.get(line[field]))[0])
                for line in one.get(key, ())
            ]
            if lines:
                tables.append({"title": f"{name} {title}", "lines": lines})
    return {
        "rows": rows,
        "tables": tables,
        "absent": _section(after, "absent") or _section(before, "absent"),
    }


def _cosine(value: Any, interval: Any = None, signed: bool = False) -> tuple[str, str | None]:
    """Show a cosine, or a difference of two, with its interval."""
    number = _number(value)
    if number is None:
        return "—", None
    form = "{:+.3f}" if signed else "{:.3f}"
    ends = " to ".join(form.format(end) for end in interval) if interval else None
    return form.format(number).replace("-", "−"), ends.replace("-", "−") if ends else None


def _spread(steps: list[int], count: int) -> list[int]:
    """Return at most so many, at even distances, the first and the last among them."""
    if len(steps) <= count:
        return steps
    return [steps[round(k * (len(steps) - 1) / (count - 1))] for k in range(count)]


def _thumbnail(run: RunDirectory, file: str | None, size: int) -> str | None:
    path = run.path / file if file else None
    if path is None or not path.is_file():
        return None
    data, kind = path.read_bytes(), "png"
    try:
        from PIL import Image
    except ImportError:
        pass  # the whole picture then
    else:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((size, size))
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=85)
        data, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _verdict(rows: Sequence[Mapping[str, Any]], count: int, answered: int, unit: str = UNIT) -> str | None:
    """Say in one sentence what tuning did: the loss first, then the first share."""
    said = [row for row in rows if row["key"] == "loss"] + [row for row in rows if row["form"] == "share"][:1]
    parts: list[str] = []
    for row in said or rows[:1]:
        interval = f" (95\u00a0% interval {row['after_interval']})" if row["after_interval"] else ""
        course = (
            f"{row['before']} → {row['after']}{interval}"
            if row["change"]
            else f"{row['before']} before tuning"
        )
        parts.append(f"{row['label'].lower() if parts else row['label']} {course}")
    if not parts:
        return None
    some = f", {answered} of which were answered" if 0 < answered < count else ""
    where = f" on {count} {unit}{some}" if count and unit.startswith("held-out") else ""
    worse = [row["label"].lower() for row in said if row.get("direction") == "worse"]
    also = f" Tuning made the {' and the '.join(worse)} worse." if worse else ""
    if all(row["after"] == "—" for row in rows):
        also = " Nothing was measured after it."
    return f"{'; '.join(parts)}{where}.{also}"


def _chance(predictions: Sequence[Mapping[str, Any]]) -> str | None:
    """Say how many single answers changed, and whether that could be chance."""
    pairs = [(line.get("base_ok"), line.get("tuned_ok")) for line in predictions]
    fixed, broken = pairs.count((False, True)), pairs.count((True, False))
    if not any(isinstance(base, bool) and isinstance(tuned, bool) for base, tuned in pairs):
        return None
    if not fixed + broken:
        return "Tuning turned no answer from wrong to right or back."
    p = sign_test(fixed, broken)
    judged = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    close = f"Chance alone would often do that: no difference shown ({judged})."
    clear = f"Chance alone would rarely do that ({judged}, exact sign test)."
    return f"Tuning fixed {fixed} answers and broke {broken}. {close if p >= 0.05 else clear}"


def _kind_rows(predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for line in predictions:
        if line.get("kind") is not None:
            kinds.setdefault(str(line["kind"]), []).append(line)
    rows = []
    for kind, lines in kinds.items():
        row: dict[str, Any] = {"kind": kind, "count": len(lines)}
        for phase, key in (("before", "base_ok"), ("after", "tuned_ok")):
            marks = _marks(lines, key)
            row[phase] = _shown(sum(marks) / len(marks), _SHARE) if marks else "—"
            row[f"{phase}_interval"] = (
                _shown_interval(wilson_interval(sum(marks), len(marks)), _SHARE) if marks else None
            )
            row[f"{phase}_share"] = sum(marks) / len(marks) if marks else None
        rows.append(row)
    return rows


def _changes(predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    rest = [{**dict.fromkeys(PREDICTION), **line} for line in predictions]
    for marks, (title, shown) in CHANGES.items():
        lines = [line for line in rest if (line.get("base_ok"), line.get("tuned_ok")) == marks]
        rest = [line for line in rest if (line.get("base_ok"), line.get("tuned_ok")) != marks]
        if lines:
            groups.append({"title": title, "count": len(lines), "lines": lines[:shown]})
    if rest:
        groups.append({"title": "Not judged", "count": len(rest), "lines": rest[:6]})
    return groups


def _with_pictures(run: RunDirectory, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the small pictures that questions are about beside them, as data URIs, as many as a page can hold."""
    left = ALL_SEEN_BYTES
    for group in groups:
        for line in group["lines"]:
            files = line["thumbnails"] if isinstance(line["thumbnails"], list) else []
            shown = []
            for file in files[:SEEN]:
                uri = _small_copy(run, file)
                if uri is not None and len(uri) <= left:
                    left -= len(uri)
                    shown.append(uri)
            line["seen"], line["unseen"] = shown, len(files) - len(shown)
    return groups


def _small_copy(run: RunDirectory, file: Any) -> str | None:
    path = (run.path / file).resolve() if isinstance(file, str) else None
    if path is None or path.suffix != ".webp" or not path.is_file():
        return None
    if not path.is_relative_to(run.path.resolve()) or path.stat().st_size > SEEN_BYTES:
        return None
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _proof(name: str, proof: Any) -> dict[str, Any]:
    by_diffusers = isinstance(proof, Mapping) and proof.get("reader") == "diffusers"
    known = "reload in diffusers" if name == "reload" and by_diffusers else name
    field, label = PROOFS.get(known, (None, name.replace("_", " ").capitalize()))
    entries = proof if isinstance(proof, Mapping) else {"value": proof}
    if field is None:
        field = next(
            (key for key, value in entries.items() if key != "tolerance" and _is_number(value)), "value"
        )
    value, tolerance = _number(entries.get(field)), _number(entries.get("tolerance"))
    # The mark is worked out here from the two numbers, not taken from whoever wrote them.
    verdict = "no number" if value is None else "no tolerance recorded" if tolerance is None else None
    return {
        "label": label,
        "value": "—" if value is None else f"{value:.2g}",
        "tolerance": "—" if tolerance is None else f"{tolerance:.2g}",
        "mark": verdict
        or ("passed" if value is not None and tolerance is not None and value <= tolerance else "failed"),
    }


def _glance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the few facts that go under the verdict."""
    facts = []
    base = _section(record, "base").get("name") or _section(record, "base").get("path")
    if base:
        facts.append(("base model", str(base)))
    trainable = _number(record.get("trainable_parameters"))
    if trainable is not None:
        total = _number(record.get("total_parameters"))
        share = f" ({100 * trainable / total:.2g}\u00a0% of all)" if total else ""
        facts.append(("trained parameters", f"{int(trainable):,}".replace(",", "\u202f") + share))
    seconds = _number(_section(record, "timing").get("train_seconds"))
    if seconds is not None:
        facts.append(("training time", _duration(seconds)))
    hardware = _section(record, "hardware")
    where = ", ".join(hardware.get("gpus") or []) or hardware.get("cpu")
    processes = record.get("processes", 1)
    if where:
        facts.append(("ran on", str(where) + (f", {processes} processes" if processes > 1 else "")))
    if record.get("seed") is not None:
        facts.append(("seed", str(record["seed"])))
    if record.get("ended"):
        facts.append(("ended", str(record["ended"])[:16].replace("T", " ") + " UTC"))
    return facts


def _files(run: RunDirectory) -> list[dict[str, str]]:
    found = []
    for name, purpose in FILES.items():
        path = run.path / name
        if path.exists():
            parts = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
            shown = f"{name}/" if path.is_dir() else name
            size = sum(p.stat().st_size for p in parts)
            if size:
                found.append({"name": shown, "purpose": purpose, "size": _size(size)})
    return found


def _snippet(run: RunDirectory, record: Mapping[str, Any]) -> str:
    """Return the lines that load the fold with stock PEFT."""
    base = _section(record, "base")
    path = base.get("path")
    if base.get("reader") == "diffusers":
        file = next(
            (p.name for p in sorted(run.lora.glob("*.safetensors"))), "pytorch_lora_weights.safetensors"
        )
        kind = base.get("auto_class", "DiffusionPipeline")
        variant = f", variant={base['variant']!r}" if base.get("variant") else ""
        return "\n".join(
            [
                f"from diffusers import {kind}",
                "",
                f"pipe = {kind}.from_pretrained({str(path or 'BASE MODEL')!r}{variant})",
                f"pipe.load_lora_weights({str(run.lora)!r}, weight_name={file!r})",
            ]
        )
    config = run.lora / "adapter_config.json"
    if not path and config.is_file():
        path = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    gguf = f", gguf_file={base['gguf_file']!r}" if base.get("gguf_file") else ""
    auto_class = base.get("auto_class", "AutoModelForCausalLM")
    reads_text = auto_class == "AutoModelForCausalLM"
    reader, name = ("AutoTokenizer", "tokenizer") if reads_text else ("AutoProcessor", "processor")
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {auto_class}, {reader}",
            "",
            f"base = {str(path or 'BASE MODEL')!r}",
            f"{name} = {reader}.from_pretrained(base{gguf})",
            f"model = {auto_class}.from_pretrained(base{gguf})",
            f"model = PeftModel.from_pretrained(model, {str(run.lora)!r})",
        ]
    )


def _flat(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys with their values as text."""
    if isinstance(section, Mapping):
        for key, value in section.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(section, list):
        yield prefix, ", ".join(map(str, section)) or "none"
    else:
        yield prefix, "—" if section is None else str(section)


def _section(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = record.get(key)
    return section if isinstance(section, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None


_SHARE = Metric("", "share", "higher")


def _shown(value: float | None, metric: Metric) -> str:
    if value is None:
        return "—"
    return f"{_percent(value)}\u00a0%" if metric.form == "share" else _figure(value)


def _shown_interval(interval: Sequence[float], metric: Metric) -> str:
    low, high = interval  # U+2060 keeps a line from ending between the two
    if metric.form == "number":
        return f"{_figure(low)}–\u2060{_figure(high)}"
    if high - low < 0.05:
        return f"{_percent(low)}–\u2060{_percent(high)}\u00a0%"
    return f"{100 * low:.0f}–\u2060{100 * high:.0f}\u00a0%"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _figure(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value == 0 or 0.001 <= abs(value) < 100_000:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:.{min(digits, 5)}f}"
    return f"{value:.2e}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    )


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _clipped(value: Any) -> str:
    if value is None:
        return "—"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= CLIP else f"{text[:CLIP]} … ({len(text) - CLIP} more characters)"
