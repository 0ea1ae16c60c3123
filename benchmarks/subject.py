"""Does an image model learn a new subject better through a mixer than through a plain LoRA?

The small world of ``recipes/shapes``: an SDXL-shaped pipeline that draws captioned shapes learns one star in stripes,
which it has never seen, from five pictures, and is then asked for it on backgrounds, and for other things. A network
that was taught to read this world says of each picture whether the subject is there and whether the rest is as the
prompt asks. Adapters are trained by ``moslora train`` and measured as it ships them: plain LoRA, read by diffusers.
LoRA is the mixer that is the identity and stays so. Each method's learning rate is the best of a few on a seed of its
own, by pictures from other noise than what is reported.

    python benchmarks/subject.py [--folder DIR] [--seeds 0,1,2,3,4,5] [--rates 3e-4,1e-3,3e-3,1e-2] [--out FILE]

DIR keeps what was trained and measured, so a stopped run continues. Pipeline and judge are built where they
are missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "shapes"))
import build_pipeline
import captions
import judge as judging
from captions import COLOURS, GROUNDS, SHAPES

SHAPES_FOLDER = Path(captions.__file__).parent
METHODS = {
    "lora": ["adapter.mixer=identity", "adapter.train_mixer=false"],
    "moslora": ["adapter.mixer=kaiming"],
    "moslora-orthogonal": ["adapter.mixer=orthogonal"],
}
TUNING_SEED = 100
STEPS, BATCH, RANK = 600, 4, 4
INFERENCE_STEPS, GUIDANCE, DRAWS = 15, 3.0, 4
NOISE = {"reported": 5000, "tuning": 7000, "captions": 9000}
HELDOUT_SEED, HELDOUT = 2_000_003, 64  # captions that show how well the base draws at all


@dataclass(frozen=True)
class Asked:
    """A prompt and what it asks for.

    Attributes:
        prompt: The words.
        subject: Whether the subject shall be there.
        ground: The background.
        other: A shape and a colour of something else, where it is asked for instead.
    """

    prompt: str
    subject: bool
    ground: str
    other: tuple[str, str] | None = None


def asked() -> list[Asked]:
    """Return 16 prompts for the subject, four on each background, and 16 for other things, four of them stars.

    Places are not asked for, nor two things at once: the base does not draw these as it is told.
    """
    found = []
    for ground in GROUNDS:
        for start in ("", "a photo of "):
            found += [Asked(f"{start}ikat star on a {ground} background", True, ground)] * 2
    for index in range(16):
        ground, colour = list(GROUNDS)[index % 4], list(COLOURS)[(index + index // 4) % 4]
        shape = SHAPES[-1 - index // 4]
        words = f"a photo of a {colour} {shape} on a {ground} background"
        found.append(Asked(words, False, ground, other=(shape, colour)))
    return found


def score(wanted: Asked, seen: judging.Reading) -> dict[str, float]:
    """Judge a reading of a picture.

    Returns:
        For prompts with the subject: ``"subject"``, it is there; ``"followed"``, a star of whatever paint is there, on
        the background that was asked for; ``"both"``, the subject on that background. For others: ``"kept"``, the thing
        is there on its background and the subject is not.
    """
    on_ground = seen.ground == wanted.ground
    if not wanted.subject:
        there = wanted.other in seen.things.values()
        return {"kept": float(there and on_ground and not seen.shows_subject())}
    star = any(shape == "star" for shape, _ in seen.things.values())
    return {
        "subject": float(seen.shows_subject()),
        "followed": float(star and on_ground),
        "both": float(seen.shows_subject() and on_ground),
    }


def drawn(pipeline: Any, prompts: list[str], noise: int) -> list[Any]:
    """Draw prompts, the n-th from the noise of seed ``noise + n``."""
    import torch

    pictures: list[Any] = []
    for start in range(0, len(prompts), 32):
        some = prompts[start : start + 32]
        pictures += pipeline(
            some,
            num_inference_steps=INFERENCE_STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(noise + start + n) for n in range(len(some))],
        ).images
    return pictures


def heldout() -> list[tuple[Any, captions.Scene]]:
    """Return scenes with captions, from a seed that the pipeline was not trained on."""
    return captions.captioned(HELDOUT_SEED, HELDOUT)


def measure(
    pipeline: Any, judge: Any, adapter: Path | None, noise: str, keep: Path
) -> dict[str, list[float]]:
    """Draw every prompt ``DRAWS`` times, from noise that is every method's, and read the pictures.

    Scores stay in ``keep``, and the first picture of each prompt.
    """
    from PIL import Image

    kept = keep / f"measured-{noise}-{DRAWS}-{GUIDANCE}.json"
    if kept.exists():
        found: dict[str, list[float]] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    prompts = asked()
    wanted = prompts * DRAWS
    if adapter is not None:
        pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    try:
        pictures = drawn(pipeline, [one.prompt for one in wanted], NOISE[noise])
    finally:
        if adapter is not None:
            pipeline.unload_lora_weights()
    scores: dict[str, list[float]] = {}
    for one, seen in zip(wanted, judging.read(judge, pictures), strict=True):
        for name, value in score(one, seen).items():
            scores.setdefault(name, []).append(value)
    keep.mkdir(parents=True, exist_ok=True)
    edge = captions.EDGE + 2
    sheet = Image.new("RGB", (8 * edge, -(-len(prompts) // 8) * edge), (90, 90, 90))
    for n, picture in enumerate(pictures[: len(prompts)]):
        sheet.paste(picture, (n % 8 * edge, n // 8 * edge))
    sheet.resize((sheet.width * 4, sheet.height * 4), Image.Resampling.NEAREST).save(
        keep / f"pictures-{noise}.png"
    )
    kept.write_text(json.dumps(scores), encoding="utf-8")
    return scores


def trained(folder: Path, world: dict[str, Path], name: str, arguments: list[str], steps: int) -> Path:
    """Train with the command's own code, or find what an earlier call has trained; returns the LoRA file."""
    from moslora.display import Display
    from moslora.training.run import train

    record = folder / name / "run.json"
    if not (record.exists() and json.loads(record.read_text(encoding="utf-8"))["status"] == "completed"):
        settings = [
            *("task.kind=image", "task.loss_draws=2", f"model={world['pipeline']}", "model.dtype=float32"),
            *(f"data={world['subject']}", "data.prompt=a photo of ikat star"),
            *(f"adapter.r={RANK}", f"adapter.lora_alpha={RANK}", f"trainer.max_steps={steps}"),
            *(f"trainer.per_device_train_batch_size={BATCH}", f"output.dir={folder}", f"output.name={name}"),
            *arguments,
        ]
        start = time.process_time()
        train(settings, Display(quiet=True), f"benchmarks/subject.py: {name}")
        print(f"  {name}: trained in {time.process_time() - start:.0f} CPU seconds", flush=True)
    return folder / name / "lora" / "pytorch_lora_weights.safetensors"


def build_world(folder: Path, quick: bool) -> dict[str, Path]:
    """Build pipeline, judge and the subject's pictures where they are missing; ``quick`` ones stay in ``folder``."""
    home = folder if quick else SHAPES_FOLDER
    world = {name: home / name for name in ("pipeline", "judge", "subject")}
    if not world["pipeline"].exists():
        build_pipeline.build(world["pipeline"], build_pipeline.QUICK if quick else build_pipeline.Amount())
    if not world["judge"].exists():
        judging.save(judging.train(*((2, 4, 16) if quick else ())), world["judge"], 20 if quick else 2000)
    captions.write(world["subject"])
    return world


def sha256(folder: Path) -> str:
    """Return one hash of a folder's weights."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def main() -> None:
    """Train, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps what was trained; a temporary one without it")
    parser.add_argument("--seeds", default="0,1,2,3,4,5")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument(
        "--rates", default="3e-4,1e-3,3e-3,1e-2", help="learning rates to choose from; one is taken as it is"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--quick", action="store_true", help="an untrained world in DIR, to try the script out"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "subject.json")
    wanted = parser.parse_args()
    seeds = [int(seed) for seed in wanted.seeds.split(",")]
    methods, rates = wanted.methods.split(","), wanted.rates.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (wanted.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        result = compared(folder, methods, seeds, rates, wanted.steps, wanted.quick)
    import measure as shared

    about = "Does an image model learn a new subject better through a mixer than through a plain LoRA?"
    shared.write({**shared.header(about, "cpu"), **result}, wanted.out)


def compared(
    folder: Path, methods: list[str], seeds: list[int], rates: list[str], steps: int, quick: bool
) -> dict[str, Any]:
    """Train and measure everything, and judge the differences."""
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline

    from moslora.metrics.intervals import holm, mean_interval, paired_difference

    warnings.filterwarnings("ignore", message=".*(fast image processor|torchvision|__array__).*")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    world = build_world(folder, quick)
    # What was kept is of use to the same pipeline, judge and number of steps alone.
    folder = folder / f"{sha256(world['pipeline'])[:8]}-{sha256(world['judge'])[:8]}-{steps}"
    judge = judging.load(world["judge"])
    pipeline = DiffusionPipeline.from_pretrained(world["pipeline"])
    pipeline.set_progress_bar_config(disable=True)

    pictures = drawn(pipeline, [shown.caption for _, shown in heldout()], NOISE["captions"])
    readings = judging.read(judge, pictures)
    followed = [judging.follows(s, r) for (_, s), r in zip(heldout(), readings, strict=True)]
    print(f"the base draws {sum(followed)} of {len(followed)} held-out captions as they say", flush=True)

    def cell(method: str, rate: str, seed: int, noise: str) -> dict[str, list[float]]:
        name = f"{method}-{rate}-{seed}"
        arguments = [*METHODS[method], f"trainer.learning_rate={rate}", f"seed={seed}"]
        lora = trained(folder, world, name, arguments, steps)
        return measure(pipeline, judge, lora, noise, folder / name)

    base = measure(pipeline, judge, None, "reported", folder / "base")
    tuning: dict[str, dict[str, dict[str, float]]] = {}
    chosen = dict.fromkeys(methods, rates[0])
    if len(rates) > 1:
        for method in methods:
            found = {rate: means(cell(method, rate, TUNING_SEED, "tuning")) for rate in rates}
            tuning[method], chosen[method] = found, max(rates, key=lambda rate: found[rate]["both"])
            print(f"{method}: rate {chosen[method]}", flush=True)
    cells = {m: [cell(m, chosen[m], seed, "reported") for seed in seeds] for m in methods}
    table = {}
    for method, of_seed in cells.items():
        table[method] = {"rate": float(chosen[method])}
        for name in of_seed[0]:
            values = [statistics.fmean(scores[name]) for scores in of_seed]
            table[method][name] = {
                "mean": statistics.fmean(values),
                "interval_over_seeds": list(mean_interval(values)) if len(values) > 1 else None,
                "of_seeds": values,
            }
    differences = []
    others = [m for m in methods if m != methods[0]]
    for name in cells[methods[0]][0]:
        found = []
        for other in others if len(seeds) > 1 else []:
            pairs = zip(cells[other], cells[methods[0]], strict=True)
            rows = [
                [a - b for a, b in zip(x[name], y[name], strict=True)] for x, y in pairs
            ]  # (seeds, prompts)
            found.append(paired_difference(rows))
        for other, one, corrected in zip(others, found, holm([one.p for one in found]), strict=False):
            about = {"score": name, "of": other, "less": methods[0], **asdict(one), "p_holm": corrected}
            differences.append(about)
    for name, scores in (("base", base), *((m, {}) for m in methods)):
        shown = means(scores) if scores else {k: v["mean"] for k, v in table[name].items() if k != "rate"}
        print(f"{name:<20}", "  ".join(f"{k} {v:.1%}" for k, v in shown.items()))
    return {
        "about": (__doc__ or "").split("\n\n")[1].replace("\n", " "),
        "steps": steps,
        "batch": BATCH,
        "rank": RANK,
        "inference_steps": INFERENCE_STEPS,
        "guidance": GUIDANCE,
        "pictures_of_a_prompt": DRAWS,
        "seeds": seeds,
        "tuning_seed": TUNING_SEED if len(rates) > 1 else None,
        "rates": [float(rate) for rate in rates],
        "prompts": {"with the subject": 16, "without it": 16},
        "pipeline": {
            **json.loads((world["pipeline"] / "built.json").read_text()),
            "sha256": sha256(world["pipeline"]),
        },
        "judge": json.loads((world["judge"] / "judge.json").read_text())["accuracy"],
        "judge_sha256": sha256(world["judge"]),
        "base": {**means(base), "heldout_captions_followed": statistics.fmean(followed), "heldout": HELDOUT},
        "diffusers": diffusers.__version__,
        "tuning": tuning,
        "results": table,
        "differences": differences,
    }


def means(scores: dict[str, list[float]]) -> dict[str, float]:
    """Return each score's mean."""
    return {name: statistics.fmean(values) for name, values in scores.items()}


if __name__ == "__main__":
    main()
