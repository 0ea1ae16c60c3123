"""Write the tables of README and docs/performance.md from the JSON under ``results/``.

What stands between a pair of markers, ``<!-- table NAME: … -->`` and ``<!-- end of table NAME -->``, is made here and
nowhere else. A script whose result is not there has no row.

    python benchmarks/table.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Rows = list[tuple[str, ...]]

# Results that have no row, and why.
WITHOUT_ROW = {
    "advice-rate.json": "two seeds, for a best rate and not for a difference; docs/advise.md has what it says",
    "advice-targets.json": "of one data set; docs/advise.md has what it says",
    "boolq-minilm.json": "of a difference that was not found; docs/classification.md has what it says",
    "preference-home.json": "of one run; docs/preferences.md has what it says",
    "price.json": "of one short run; docs/compare.md and the log have what it says",
    "sequential.json": "simulated, not measured; docs/compare.md has what it says",
    "roofline.json": "counted, not measured; docs/performance.md has what it says",
    "vlm_memory.json": "of one reader; docs/picture-benchmarks.md has what it says",
    "vlm_rules.json": "a comparison of rules, not of costs; docs/picture-benchmarks.md has what it says",
}


def machine(found: dict[str, Any]) -> str:
    """Say where it was measured."""
    name = found.get("device_name", "CPU")
    hardware = found["hardware"]
    return f"{hardware['cores']} cores of an {hardware['cpu']}" if name == "CPU" else name


def megabytes(count: float) -> str:
    """Write bytes as megabytes or gigabytes."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.2g} GB"


def step_rows(found: dict[str, Any]) -> Rows:
    """One training step: ours and PEFT's LoRA over the frozen base, with dropout and without."""
    shape, contenders, model = found["shape"], found["contenders"], found["model"]
    name = model if isinstance(model, str) else f"a Llama of {model['layers']} × {model['hidden']}"
    how = (
        f"`benchmarks/step.py`: {name}, {shape['rows']} × {shape['length']} tokens, r {shape['rank']} on "
        f"{len(shape['targets'])} kinds of layer, {found['dtype'].removeprefix('torch.')}, medians of "
        f"{found['rounds']} interleaved rounds, {machine(found)}"
    )
    rows: Rows = []
    for case, note in (("", how), (", dropout 0.05", "the same")):
        ours, peft = contenders[f"MoSLoRA{case}"], contenders[f"PEFT LoRA{case}"]
        figure = (
            f"{ours['over_floor']:.2f} × the frozen base's, keeping {megabytes(ours['saved_bytes'])}; PEFT's LoRA "
            f"{peft['over_floor']:.2f} ×, {megabytes(peft['saved_bytes'])}"
        )
        rows.append((f"a training step{case}", figure, note))
    return rows


def job_rows(found: dict[str, Any]) -> Rows:
    """A whole fine-tuning job beside TRL with PEFT's LoRA."""
    settings, contenders = found["settings"], found["contenders"]
    ours, peft = contenders["MoSLoRA"], contenders["TRL + PEFT LoRA"]
    on_cpu = found["device"] == "cpu"
    key = "cpu_seconds_per_example" if on_cpu else "examples_per_second"
    ratio = ours[key] / peft[key]
    unit = "CPU-s an example" if on_cpu else "examples/s"
    what = "a fine-tuning job, completion-only data"
    figure = (
        f"{ours[key]:.2f} {unit}, peak {megabytes(ours['peak_bytes'])}; TRL with PEFT's LoRA {peft[key]:.2f}, "
        f"{megabytes(peft['peak_bytes'])}: {ratio:.2f} of it"
    )
    how = (
        f"`benchmarks/job.py`: {settings['model']}, {settings['steps']} steps of {settings['rows']} examples, r "
        f"{settings['rank']}, the same losses to {found['largest_loss_difference']:.0e} with the same adapter; medians "
        f"of {settings['rounds']} processes each, {machine(found)}"
    )
    return [(what, figure, how)]


def data_rows(found: dict[str, Any]) -> Rows:
    """Preparing data beside TRL, what it takes, and a second start."""
    settings, contenders = found["settings"], found["contenders"]
    ours, trl = contenders["moslora"], contenders["TRL"]
    key, note = "rows_per_processor_second", f"; {settings['note']}" if settings["note"] else ""
    figure = (
        f"{ours[key]:.0f} rows of 500 tokens a processor second, TRL {trl[key]:.0f}; by the clock "
        f"{ours['rows_per_second']:.0f} and {trl['rows_per_second']:.0f} a second"
    )
    how = (
        f"`benchmarks/data.py`: {settings['rows']} rows, the same token ids, {settings['processes']} "
        "workers, "
        f"medians of {settings['rounds']} processes each, {machine(found)}{note}"
    )
    rows: Rows = [("preparing data", figure, how)]
    if "second_start" in found:
        first, second = found["first_start"], found["second_start"]
        peaks = [megabytes(first[key]) for key in ("peak_bytes", "peak_bytes_of_a_worker")]
        figure = (
            f"{first['rows']} rows: peak {peaks[0]}, {peaks[1]} a worker; a second start is at step one after "
            f"{second['processor_seconds']:.1f} processor seconds"
        )
        rows.append(("preparing data: memory, and a second start", figure, "the same, imports included"))
    return rows


def together_rows(found: dict[str, Any]) -> Rows:
    """Trainings over one frozen base, at once."""
    several = {name: one["over_floor"] for name, one in found["contenders"].items() if name != "alone"}
    counts = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in several.items())
    shape = found["shape"]
    how = (
        f"`benchmarks/together.py`: {found['model']}, {shape['rows']} rows of {shape['tokens']} tokens in all, r "
        f"{shape['rank']}, {found['dtype'].removeprefix('torch.')}, medians of {found['rounds']} interleaved rounds, "
        f"{machine(found)}"
    )
    return [("K trainings over one frozen base: time of each, over one alone", f"K = {counts}", how)]


def spread(values: Sequence[float]) -> str:
    """Write the range of some ratios."""
    return f"{min(values):.2f} to {max(values):.2f}"


def width(case: dict[str, Any]) -> str:
    """Say how wide a layer is."""
    n_in, n_out = case["size"], case.get("out", case["size"])
    return f"{n_in}" if n_in == n_out else f"{n_in} → {n_out}"


def layer_rows(found: dict[str, Any]) -> Rows:
    """One adapted linear, over all shapes tried."""
    rows: Rows = []
    for dropout in sorted({case["dropout"] for case in found["cases"]}):
        cases = [case for case in found["cases"] if case["dropout"] == dropout]
        names = ("MoSLoRA", "PEFT LoRA", "PEFT DoRA", "mixer as a chain")
        over = {name: [case["contenders"][name]["over_floor"] for case in cases] for name in names}
        wins = sum(a < b for a, b in zip(over["MoSLoRA"], over["PEFT LoRA"], strict=True))
        figure = (
            f"{spread(over['MoSLoRA'])} × the frozen layer's; PEFT's LoRA {spread(over['PEFT LoRA'])}, its DoRA "
            f"{spread(over['PEFT DoRA'])}; below PEFT's LoRA at {wins} of {len(cases)} shapes"
        )
        sizes = ", ".join(dict.fromkeys(width(case) for case in cases))
        tokens, ranks = (
            ", ".join(str(n) for n in sorted({case[key] for case in cases})) for key in ("tokens", "rank")
        )
        how = (
            f"`benchmarks/layer.py`: widths {sizes}, tokens {tokens}, ranks {ranks}, medians of "
            f"{found['rounds']} rounds, {machine(found)}"
        )
        name = f"one adapted linear, dropout {dropout:g}" if dropout else "one adapted linear"
        rows.append((name, figure, how if not rows else "the same"))
    return rows


def merge_rows(found: dict[str, Any]) -> Rows:
    """Merging on disk, beside PEFT and ``cp``."""
    ours, peft, cp, imports = (
        found["results"][name]
        for name in ("moslora merge", "PEFT merge_and_unload", "cp", "imports of moslora merge")
    )
    figure = (
        f"{ours['seconds']:.1f} s and {megabytes(ours['peak_megabytes'] * 1e6)} of memory; PEFT's `merge_and_unload` "
        f"with saving {peft['seconds']:.1f} s and {megabytes(peft['peak_megabytes'] * 1e6)}; `cp` {cp['seconds']:.1f} s"
    )
    how = (
        f"`benchmarks/merge.py`, medians of {found['rounds']} rounds, {machine(found)}; {imports['seconds']:.1f} s of "
        "it are imports"
    )
    what = f"`moslora merge` of {megabytes(found['bytes'])}, rank {found['rank']} on all linear layers"
    return [(what, figure, how)]


def mix_rows(found: dict[str, Any]) -> Rows:
    """A learned mixer over two trained adapters."""
    results = found["results"]
    mixed, fresh = results["mix from sum"], results["fresh adapter, the same few"]
    figure = (
        f"{mixed['loss']:.3f}; each alone {results['when alone']['loss']:.3f} and {results['many alone']['loss']:.3f}, "
        f"sum {results['sum']['loss']:.3f}, mean {results['mean']['loss']:.3f}; a fresh adapter on the same "
        f"{found['few_examples']} requests {fresh['loss']:.3f}; exact match "
        f"{100 * mixed['exact_match']:.0f} %, fresh {100 * fresh['exact_match']:.0f} %"
    )
    seeds = len(found["seeds"])
    how = f"`benchmarks/mix.py`, {seeds} seed{'s' * (seeds > 1)}, {found['heldout_per_seed']} held-out requests each"
    return [("`moslora mix` of two adapters, requests that need both: held-out loss", figure, how)]


def scale_rows(found: dict[str, Any]) -> Rows:
    """A step from the smallest rank to the largest, and what the mixer alone takes of it."""
    points = found["axes"]["rank"]
    first, last = points[0], points[-1]

    def over(name: str) -> str:
        return " → ".join(f"{point['contenders'][name]['over_floor']:.2f}" for point in (first, last))

    everywhere = [p["mixer_share"] for axis in found["axes"].values() for p in axis if p["rank"] <= 64]
    figure = (
        f"{over('MoSLoRA')} × the frozen base's, PEFT's LoRA {over('PEFT LoRA')}; for the mixer alone "
        f"{100 * first['mixer_share']:.1f} → {100 * last['mixer_share']:.1f} % of ours, at most "
        f"{100 * max(everywhere):.1f} % up to rank 64"
    )
    centre = found["centre"]
    how = (
        f"`benchmarks/scale.py`: a random Llama of {centre['depth']} × {centre['width']}, {centre['tokens']} tokens, "
        f"medians of {found['rounds']} rounds, "
        f"{'processor time of one thread, ' if found['device'] == 'cpu' else ''}{machine(found)}"
    )
    return [(f"a training step from rank {first['rank']} to {last['rank']}", figure, how)]


def subject_rows(found: dict[str, Any]) -> Rows:
    """One new subject for the small image model."""
    scores = ", ".join(
        f"`{name}` {100 * of['both']['mean']:.0f} % ({100 * of['kept']['mean']:.0f} %)"
        for name, of in found["results"].items()
    )
    judged = "; ".join(
        f"`{one['of']}` minus `{one['less']}` {100 * one['mean']:+.0f} ({100 * one['low']:+.0f} to "
        f"{100 * one['high']:+.0f}) points, p {one['p_holm']:.2f}"
        for one in found["differences"]
        if one["score"] == "both"
    )
    how = (
        f"`benchmarks/subject.py`: `recipes/shapes`, {found['steps']} steps of {found['batch']} pictures, r "
        f"{found['rank']}, best of {len(found['rates'])} rates each, {len(found['seeds'])} seeds of "
        f"{found['prompts']['with the subject'] * found['pictures_of_a_prompt']} pictures; {judged}"
    )
    what = (
        "a new subject from five pictures: drawn on the background asked for (other things drawn as before)"
    )
    base = found["base"]
    return [(what, f"{scores}; base {100 * base['both']:.0f} % ({100 * base['kept']:.0f} %)", how)]


def move_rows(found: dict[str, Any]) -> Rows:
    """Which share of each factor's entries a short QLoRA through TRL moves."""

    def shares(name: str) -> str:
        moved = found["contenders"][name]["moved"]
        return ", ".join(f"{factor} {100 * one['share']:.0f} %" for factor, one in sorted(moved.items()))

    figure = "; ".join(f"{name}: {shares(name)}" for name in found["contenders"])
    how = (
        f"`benchmarks/moves.py`: `{found['base']}` in {found['quantization']}, r {found['rank']}, {found['steps']} "
        f"steps of {found['batch']} requests at {found['learning_rate']:g} through TRL, which trains in bfloat16, "
        f"{machine(found)}"
    )
    return [("QLoRA: entries that moved", figure, how)]


def decode_rows(found: dict[str, Any]) -> Rows:
    """Generating token by token: time over the base's, by model and batch, with the range over processes."""
    parts = []
    for case in found["cases"]:
        each = {name: case["contenders"][name] for name in ("MoSLoRA", "PEFT LoRA", "MoSLoRA, merged")}
        ours, peft, merged = (
            f"{one['over_floor']:.2f} ({one['range'][0]:.2f} to {one['range'][1]:.2f})"
            for one in each.values()
        )
        parts.append(f"{case['model']}, batch {case['batch']}: {ours}, PEFT's LoRA {peft}, merged {merged}")
    how = (
        f"`benchmarks/decode.py`: SmolLM2-135M and a random LLaVA of its width, r {found['rank']} on 5 kinds, "
        f"{found['new_tokens']} tokens, medians of {found['rounds']} interleaved rounds in each of "
        f"{found['processes']} processes, and their range, {machine(found)}"
    )
    return [("generating with an adapter, over the base's time", "; ".join(parts), how)]


def start_rows(found: dict[str, Any]) -> Rows:
    """How long verbs on a small adapter take, over importing torch."""
    verbs = found["sources"]["now"]["verbs"]
    figure = ", ".join(
        f"{name} {verbs[name]['over_floor']:.2f} ×" for name in ("help", "inspect", "doctor", "import")
    )
    figure += (
        f", merge {verbs['merge']['over_floor']:.2f} ×; export to lora, which PEFT's own loader proves, "
    )
    figure += f"{verbs['export --to lora']['over_floor']:.2f} ×"
    how = (
        f"`benchmarks/start.py`: wall time over that of `import torch` ({found['floor']['median_seconds']:.1f} s), "
        f"medians of {found['rounds']} interleaved rounds of fresh processes, {machine(found)}"
    )
    return [("verbs on a small adapter", figure, how)]


def launch_rows(found: dict[str, Any]) -> Rows:
    """An adapted layer's operations and bytes, counted, beside PEFT's LoRA."""
    layer, rows = found["layer"], found["rows"]

    def said(row: dict[str, Any]) -> str:
        ours, theirs = row["MoSLoRA"], row["PEFT LoRA"]
        return (
            f"{ours['launches']} launches moving {megabytes(ours['bytes'])}, PEFT's LoRA {theirs['launches']} and "
            f"{megabytes(theirs['bytes'])}"
        )

    plain, dropping, quantized = (
        next(row for row in rows if all(row[key] == value for key, value in {**LAUNCHES_OF, **case}.items()))
        for case in ({"dropout": 0.0}, {"dropout": 0.05}, {"dropout": 0.0, "base": "quantized"})
    )
    figure = f"{said(plain)}; with dropout {said(dropping)}; on a quantized base {said(quantized)}"
    how = (
        f"`benchmarks/launches.py`: counted, not timed, beyond the frozen layer's; {layer['in']} → {layer['out']}, "
        f"{layer['tokens']} tokens, r {layer['rank']}, bfloat16 base, float32 factors"
    )
    return [("what an adapted layer asks of a GPU, forward and backward", figure, how)]


def principal_rows(found: dict[str, Any]) -> Rows:
    """Principal components of a layer, beside torch's whole SVD and its randomized one."""

    def said(weight: str) -> str:
        seconds = {
            way: spread([process[weight][way]["median_seconds"] for process in found["processes"]])
            for way in ("moslora", "torch.linalg.svd", "svd_lowrank, 16")
        }
        errors = {
            way: max(process[weight][way]["error"] for process in found["processes"])
            for way in ("moslora", "svd_lowrank, 16")
        }
        return (
            f"{weight}: {seconds['moslora']} s, off by {errors['moslora']:.0e}; a whole SVD "
            f"{seconds['torch.linalg.svd']} s; "
            f"`svd_lowrank` of 16 iterations {seconds['svd_lowrank, 16']} s, off by {errors['svd_lowrank, 16']:.0e}"
        )

    how = (
        f"`benchmarks/principal.py`: one float32 layer, range of {len(found['processes'])} processes, "
        f"{machine(found)}; off: of the norm of the rank-r part, from the whole SVD's"
    )
    size = found["size"]
    return [
        (f'`init_lora_weights="pissa"` of {size} × {size}, r {found["rank"]}', said("falling spectrum"), how),
        ("the same", said("random"), "the same"),
    ]


# The rows of ``launches.json`` that README names, but for what differs between them.
LAUNCHES_OF = {"factors": "float32", "dora": False, "base": "plain", "autocast": False, "checkpointed": False}


# One script, its results (on each kind of device) and its rows, in the order of the table.
ROWS: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "step-*.json": step_rows,
    "job-*.json": job_rows,
    "data-*.json": data_rows,
    "layer-*.json": layer_rows,
    "decode-*.json": decode_rows,
    "launches.json": launch_rows,
    "principal-*.json": principal_rows,
    "scale-*.json": scale_rows,
    "together-*.json": together_rows,
    "merge.json": merge_rows,
    "mix.json": mix_rows,
    "moves-*.json": move_rows,
    "subject.json": subject_rows,
    "start.json": start_rows,
}


def lay_out(rows: Rows, columns: Sequence[str]) -> str:
    """Write a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def read(pattern: str, results: Path) -> list[dict[str, Any]]:
    """Read the results of one script."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob(pattern))]


def measured(results: Path) -> str:
    """README's table: one row for each script that has a result."""
    rows = [row for pattern, make in ROWS.items() for found in read(pattern, results) for row in make(found)]
    return lay_out(rows, ("what", "figure", "how"))


def steps(results: Path) -> str:
    """Every contender of ``step.py``, over the frozen base."""
    rows = [
        (machine(found), name, f"{one['over_floor']:.3f}", megabytes(one["saved_bytes"]))
        for found in read("step-*.json", results)
        for name, one in found["contenders"].items()
    ]
    return lay_out(rows, ("where", "a training step", "over the floor", "kept for backward"))


def jobs(results: Path) -> str:
    """Every contender of ``job.py``."""
    rows = [
        (
            machine(found),
            name,
            f"{one['cpu_seconds_per_example']:.2f}",
            f"{one['examples_per_second']:.2f}",
            megabytes(one["peak_bytes"]),
        )
        for found in read("job-*.json", results)
        for name, one in found["contenders"].items()
    ]
    return lay_out(rows, ("where", "a job", "CPU-s an example", "examples/s", "peak memory"))


def layers(results: Path) -> str:
    """Every shape of ``layer.py``: times over the frozen layer's, and what is kept."""
    read_cases = [case for found in read("layer-*.json", results) for case in found["cases"]]
    names = ["MoSLoRA", "PEFT LoRA", "PEFT DoRA", "mixer as a chain"]
    names += [n for n in ("MoSLoRA, kernels", "unsloth") if any(n in c["contenders"] for c in read_cases)]
    rows = [
        (
            width(case),
            str(case["tokens"]),
            str(case["rank"]),
            f"{case['dropout']:g}",
            *(f"{case['contenders'][n]['over_floor']:.2f}" if n in case["contenders"] else "" for n in names),
            f"{case['contenders']['MoSLoRA']['saved_bytes'] / 1e6:.1f}",
            f"{case['contenders']['PEFT LoRA']['saved_bytes'] / 1e6:.1f}",
        )
        for case in read_cases
    ]
    columns = ("width", "tokens", "r", "dropout", *names, "MB kept", "PEFT's LoRA")
    return lay_out(rows, columns)


def scales(results: Path) -> str:
    """Every point of ``scale.py``: what changes, and the step over the frozen base's."""
    rows = [
        (
            axis,
            str(point[axis]),
            *(f"{point['contenders'][name]['over_floor']:.2f}" for name in ("PEFT LoRA", "MoSLoRA")),
            f"{1e3 * point['contenders']['mixer alone']['median_seconds']:.2f}",
            f"{100 * point['mixer_share']:.1f} %",
        )
        for found in read("scale-*.json", results)
        for axis, points in found["axes"].items()
        for point in points
    ]
    columns = ("what changes", "to", "PEFT LoRA", "MoSLoRA", "mixer alone, ms", "of MoSLoRA's step")
    return lay_out(rows, columns)


def launches(results: Path) -> str:
    """Every case of ``launches.py``."""
    rows = []
    for found in read("launches.json", results):
        for row in found["rows"]:
            words = [f"factors {row['factors']}"]
            words += [f"dropout {row['dropout']:g}"] * bool(row["dropout"])
            words += [word for word in ("autocast", "checkpointed") if row[word]]
            words += ["DoRA"] * row["dora"] + ["a base of another class"] * (row["base"] != "plain")
            ours, theirs = row["MoSLoRA"], row["PEFT LoRA"]
            cells = [
                f"{ours[what] / unit:.{digits}f} / {theirs[what] / unit:.{digits}f}"
                for what, unit, digits in (("launches", 1, 0), ("bytes", 1e6, 0), ("kept", 1e6, 1))
            ]
            rows.append((", ".join(words), *cells))
    columns = ("the layer", "launches, ours / PEFT's LoRA", "MB moved", "MB kept")
    return lay_out(rows, columns)


# Where a table stands, and what makes it. A page has the markers, or the table is not wanted there.
TABLES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"measured": measured},
    "docs/performance.md": {
        "step": steps,
        "job": jobs,
        "layer": layers,
        "scale": scales,
        "launches": launches,
    },
}


def fill(text: str, tables: dict[str, Callable[[Path], str]], results: Path) -> str:
    """Put the tables between their markers.

    Args:
        text: The page.
        tables: What makes each table, by the name in its markers.
        results: Folder of JSON.

    Returns:
        The page, with every table as the results say now.

    Raises:
        ValueError: If a pair of markers is not there once.
    """
    for name, make in tables.items():
        pattern = re.compile(
            rf"(<!-- table {name}:[^\n]*-->\n)(.*?)(\n<!-- end of table {name} -->)", re.DOTALL
        )
        # A blank line on both sides, or Markdown takes the comment for a part of the table.
        found = list(pattern.finditer(text))
        if len(found) == 1:
            text = f"{text[: found[0].end(1)]}\n{make(results)}\n{text[found[0].start(3) :]}"
        else:
            raise ValueError(
                f"found {len(found)} pairs of <!-- table {name}: … --> and <!-- end of table {name} -->, not one."
            )
    return text


def without_row(results: Path) -> list[str]:
    """Name the results that no row is made of."""
    placed = {path.name for pattern in ROWS for path in results.glob(pattern)}
    return sorted({path.name for path in results.glob("*.json")} - placed - WITHOUT_ROW.keys())


def main() -> None:
    """Write the tables, or tell which page is behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a page would change"
    )
    check = parser.parse_args().check
    behind = []
    for name, tables in TABLES.items():
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        new = fill(old, tables, RESULTS)
        if new != old:
            behind.append(name)
            if not check:
                page.write_text(new, encoding="utf-8")
    verb = "behind its results" if check else "written"
    print("\n".join(f"{name}: {verb}" for name in behind) or "Every table says what the results say.")
    homeless = without_row(RESULTS)
    if homeless:
        print(f"In no table: {', '.join(homeless)}; add it to ROWS or WITHOUT_ROW of benchmarks/table.py.")
    if check and (behind or homeless):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
