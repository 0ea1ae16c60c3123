"""What a kill leaves: SIGKILL at every change of a file system that a verb makes, then the verb again.

    python tests/kill.py                  every verb, every change (most of an hour on two cores)
    python tests/kill.py train export     these alone
    python tests/kill.py --every 10       every tenth change of each

A run of a verb is a process, forked from this one so that it need not import anything. An audit hook counts what it
does to files in its world, and ends it with SIGKILL before change number n; where the change is a file opened to be
written, once more with that file there and empty. Then the verb is called again, as a user would: ``train`` and ``mix``
with ``--resume`` where there is a run, the others as before. What is there in the end must be what an undisturbed call
leaves, byte for byte but for times and the like, with nothing beside it, and at no moment anything half written in a
place that was asked for. Writes of libraries that open files themselves (safetensors, torch) are seen at the next
change.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CHANGES = {
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.truncate": 1,
}  # and "open"; event → how many of its arguments are paths
WRITING = os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Keys of JSON that no two runs have alike: times, sizes of memory, processes.
VARYING = re.compile(
    r"seconds|runtime|per_second|bytes|^(started|ended|resumed|pid|process_started|commands?|timing|flos|total_flos|"
    r"train_loss|stage_seconds)$"
)
TIMES = re.compile(
    r"\d{4}-\d\d-\d\d[T ][\d:.+Z]+|\b(?:\d[\d.,]* (?:s|min|ms|h|B|kB|MB|GB)\b ?)+|(?<=_seconds</td><td>)[\d.]+"
)
# Written by the trainer, with times in it; what is in it is held by the weights that come of it.
PASSED_OVER = re.compile(r"(^|/)(training_args\.bin|trainer_state\.json)$")


# Of each change its audit event and its path in the world.
Changes = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb that is tried.

    Attributes:
        command: Its arguments on the command line, in a world as ``make_world`` makes it.
        out: What it leaves, of which nothing else may be left.
        resumed: Arguments to continue with, where ``out`` has a ``run.json``; None for the same as before.
    """

    command: Sequence[str]
    out: str
    resumed: Sequence[str] | None = None


RECIPE = (
    "model=base", "data=train.jsonl", "data.heldout=heldout.jsonl", "task.metric=json", "task.max_new_tokens=4",
    "adapter.r=2", "trainer.max_steps=3", "trainer.save_steps=2", "trainer.per_device_train_batch_size=2",
    "trainer.learning_rate=5e-3",
)  # fmt: skip
PREFERENCES = ("task=preference", "data=pairs.jsonl", "data.heldout=null", "data.heldout_fraction=0.3")
VERBS = {
    "train": Verb(["train", *RECIPE, "output.name=one"], "runs", ["train", "--resume", "runs/one"]),
    "train longer": Verb(["train", "--resume", "runs-made/made", "trainer.max_steps=5"], "runs-made"),
    "train on preferences": Verb(
        ["train", *RECIPE, *PREFERENCES, "output.name=one"], "runs", ["train", "--resume", "runs/one"]
    ),
    "mix": Verb(
        ["mix", "native", "other", "--recipe", "few.yaml", "output.name=mixed"],
        "runs",
        ["train", "--resume", "runs/mixed"],
    ),
    "compare": Verb(
        ["compare", *RECIPE, "--seeds", "2", "--learning-rates", "1e-3", "--validation", "4", "--steps", "1",
         "--confirm", "2", "--off-rates", "3", "--out", "out"],
        "out",
    ),
    "evaluate": Verb(
        ["evaluate", "base", "--adapter", "lora", "--data", "heldout.jsonl", "--predictions", "out.jsonl"],
        "out.jsonl",
    ),
    "report": Verb(["report", "runs-made/made"], "runs-made"),
    "export": Verb(["export", "native", "out"], "out"),
    "export to native": Verb(["export", "native", "out", "--to", "native"], "out"),
    "export to gguf": Verb(["export", "native", "out.gguf", "--to", "gguf", "--base", "base"], "out.gguf"),
    "export to diffusers": Verb(["export", "drawing", "out.safetensors", "--to", "diffusers"], "out.safetensors"),
    "export to kohya": Verb(["export", "drawing", "out.safetensors", "--to", "kohya"], "out.safetensors"),
    "export to original": Verb(
        ["export", "painting/transformer", "out.safetensors", "--to", "original"], "out.safetensors"
    ),
    "import": Verb(["import", "lora", "out"], "out"),
    "combine": Verb(["combine", "native", "other", "--out", "out"], "out"),
    "merge": Verb(["merge", "base", "native", "out"], "out"),
    "inspect": Verb(["inspect", "native", "--html", "out.html"], "out.html"),
    "doctor": Verb(["doctor", "native", "--base", "base", "--for", "peft,vllm"], "none"),
    "push": Verb(["push", "lora", "ada/tuned", "--dry-run"], "none"),
    "chat": Verb(["chat", "lora", "--base", "base"], "none"),
    "advise": Verb(["advise", *RECIPE], "none"),
    "plan": Verb(["plan", "model=base", "adapter.r=2"], "none"),
    "merge a GGUF base": Verb(["merge", "base.gguf", "native", "out"], "out"),
}  # fmt: skip


# --- The world ----------------------------------------------------------------------------------------------


def make_world(folder: Path) -> None:
    """Make what the verbs read: a base, data, adapters, and a finished run."""
    import torch
    from peft import get_peft_model
    from safetensors.torch import save_file

    import moslora
    import tiny

    tiny.save_chat_model(folder / "base")
    tiny.save_gguf(folder / "base.gguf", tiny.llama(vocab_size=260, max_position_embeddings=256))
    tiny.save_chat_data(folder / "train.jsonl", 12)
    tiny.save_chat_data(folder / "heldout.jsonl", 3)
    pairs = [{"prompt": f"say {i}", "chosen": f"{i % 3}", "rejected": "no" * (i % 2 + 1)} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    for seed, name in ((1, "native"), (2, "other")):
        torch.manual_seed(seed)
        config = moslora.MoSLoRAConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(tiny.llama(vocab_size=259, max_position_embeddings=256), config)
        model.peft_config["default"].base_model_name_or_path = "base"
        model.save_pretrained(folder / name, save_embedding_layers=False)
    moslora.export(folder / "native", folder / "lora")
    keys = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in")
    drawing = {f"unet.{key}.lora_{side}.weight": torch.randn(2, 2) for key in keys for side in "AB"}
    save_file(drawing, folder / "drawing.safetensors")
    moslora.import_adapter(folder / "drawing.safetensors", folder / "drawing")
    keys = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q")
    painting = {f"transformer.{key}.lora_{side}.weight": torch.randn(2, 2) for key in keys for side in "AB"}
    save_file(painting, folder / "painting.safetensors")
    moslora.import_adapter(folder / "painting.safetensors", folder / "painting")
    said = json.loads((folder / "painting/transformer/adapter_config.json").read_text(encoding="utf-8"))
    said["auto_mapping"] = {"base_model_class": "FluxTransformer2DModel", "parent_library": "diffusers"}
    (folder / "painting/transformer/adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    (folder / "few.yaml").write_text(
        "model: {name: base}\n"
        "data: {train: train.jsonl, heldout: heldout.jsonl}\n"
        "trainer: {max_steps: 2, save_steps: 1, per_device_train_batch_size: 2}\n",
        encoding="utf-8",
    )


# --- One process ---------------------------------------------------------------------------------------------


class Counter:
    """Counts changes in a process's world, and kills the process before one of them.

    Args:
        world: Changes elsewhere do not count.
        last: The number of the change that does not come about; 0 for none.
        emptied: Where that change is a file opened to be written, leave it there and empty.
        told: Where the changes are written in the end, each with its kind and place.
    """

    def __init__(self, world: Path, last: int, emptied: bool, told: Path) -> None:
        self.world, self.last, self.emptied, self.told = world, last, emptied, told
        self.seen: list[tuple[str, str]] = []
        self.busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy or (event not in CHANGES and event != "open"):
            return
        self.busy = True
        try:
            self.look(event, arguments)
        finally:
            self.busy = False

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count an event if it is a change in the world."""
        if event == "open":
            paths, place = arguments[:1], -1
            if not isinstance(arguments[2], int) or not arguments[2] & WRITING:
                return
        else:
            paths = arguments[: CHANGES[event]]
            place = next((a for a in arguments[CHANGES[event] :] if isinstance(a, int) and a >= 0), -1)
        ours = [name for path in paths if (name := self.name_of(path, place)) is not None]
        if not ours or self.changes_nothing(event, self.world / ours[-1]):
            return
        self.seen.append((event, ours[-1]))
        if len(self.seen) == self.last:
            if event == "open" and self.emptied:
                os.close(os.open(arguments[0], arguments[2] | os.O_CREAT, 0o666))
            os.kill(os.getpid(), signal.SIGKILL)

    def changes_nothing(self, event: str, path: Path) -> bool:
        """Say whether a call will fail, as a directory's that may be there already, or is another library's."""
        is_there = os.path.lexists(path)
        is_foreign = path.parent == self.world / "tmp" and not path.name.startswith("moslora-")
        return is_foreign or (event == "os.mkdir" and is_there) or (event == "os.remove" and not is_there)

    def name_of(self, path: Any, place: int) -> str | None:
        """Return a path from the world on; None if it is elsewhere."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        whole = Path(os.fsdecode(path))
        if not whole.is_absolute():
            start = Path.cwd()
            if place >= 0:
                with contextlib.suppress(OSError):
                    start = Path(f"/proc/self/fd/{place}").readlink()
            whole = start / whole
        return whole.relative_to(self.world).as_posix() if whole.is_relative_to(self.world) else None

    def tell(self) -> None:
        """Write what was seen."""
        self.busy = True
        self.told.write_text(json.dumps(self.seen))


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative for a signal), its changes (if it lived) and what it said."""

    code: int
    changes: Changes
    said: str


def call(command: Sequence[str], world: Path, aside: Path, last: int = 0, emptied: bool = False) -> Ended:
    """Run a verb in a fork of this process, in a world.

    Args:
        command: Its arguments.
        world: The folder it runs in; its temporary files are in ``tmp`` in it.
        aside: A folder outside.
        last: Kill it before this change, counted from 1; 0 lets it live.
        emptied: See ``Counter``.
    """
    said, told = aside / "said", aside / "told"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(descriptor, number)
            os.chdir(world)
            warnings.simplefilter("ignore")
            os.environ |= {"MOSLORA_CACHE": str(world / "cache"), "TMPDIR": str(world / "tmp")}
            tempfile.tempdir = str(world / "tmp")
            sys.argv = ["moslora", *command]
            counter = Counter(world, last, emptied, told)
            sys.addaudithook(counter)
            from moslora.cli import app

            try:
                app(list(command))
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            counter.tell()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(
        code, json.loads(told.read_text()) if told.exists() else [], said.read_text(errors="replace")
    )


# --- What is left ---------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Leave out of JSON what no two runs have alike."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if not VARYING.search(str(key))}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return float(value) if type(value) is int else value  # YAML may give back 1.0 for 1


def digest(path: Path, world: Path) -> str:
    """Hash a file without times, and with paths from the world on."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl", ".html", ".yaml"):
        content = content.replace(f"{world}/".encode(), b"")
    if path.suffix in (".json", ".jsonl"):
        with contextlib.suppress(ValueError):
            lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
            content = json.dumps([plain(json.loads(line)) for line in lines], sort_keys=True).encode()
    elif path.suffix == ".html":
        content = TIMES.sub("", content.decode()).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def look(world: Path, before: frozenset[str]) -> dict[str, str]:
    """Hash everything that a verb left in its world.

    Args:
        world: Where.
        before: Names that were there before.
    """
    found = {}
    for path in sorted(world.rglob("*")):
        name = path.relative_to(world).as_posix()
        if name.split("/")[0] in before or PASSED_OVER.search(name):
            continue
        if name.startswith("tmp/") and not name.startswith("tmp/moslora-"):
            continue  # other libraries' own
        found[name] = digest(path, world) if path.is_file() else "folder"
    return found


def halves(world: Path, verb: Verb, wanted: dict[str, str]) -> list[str]:
    """Name what lies half written in the place that a verb was asked to write to, just after a kill.

    A run directory and a comparison grow, and say themselves that they are not finished.
    """
    if verb.out in ("runs", "runs-made", "none") or verb.command[0] in ("compare", "report"):
        return []
    if not (world / verb.out).exists():
        return []
    names = {name for name in wanted if name == verb.out or name.startswith(f"{verb.out}/")}
    found = look(world, frozenset(p.name for p in world.iterdir() if p.name != verb.out))
    return [name for name in sorted(names | found.keys()) if found.get(name) != wanted.get(name)]


# --- The trial ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tally:
    """What came of a verb's trial.

    Attributes:
        changes: How many changes an undisturbed call makes.
        points: How many kills were tried.
        faults: What was wrong, a line each.
    """

    changes: int = 0
    points: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)


class Trial:
    """Kills verbs in copies of a world.

    Args:
        folder: An empty folder for worlds.
        keep: Where worlds in which something was wrong are kept, beside the undisturbed ones; None for nowhere.
    """

    def __init__(self, folder: Path, keep: Path | None = None) -> None:
        self.keep = keep
        self.origin, self.world, self.aside = folder / "origin", folder / "world", folder / "aside"
        for path in (self.origin, self.aside):
            path.mkdir()
        make_world(self.origin)

    def fresh(self) -> frozenset[str]:
        """Make the world anew; return what is in it."""
        shutil.rmtree(self.world, ignore_errors=True)
        shutil.copytree(self.origin, self.world)
        (self.world / "tmp").mkdir()
        names = frozenset(path.name for path in self.world.iterdir())
        return names - {"tmp", "runs-made"}

    def call(self, command: Sequence[str], last: int = 0, emptied: bool = False) -> Ended:
        """Run a verb in the world."""
        return call(command, self.world, self.aside, last, emptied)

    def prepare(self, verb: Verb) -> None:
        """Make a finished run for the verb that reports one."""
        if verb.out == "runs-made" and not (self.origin / "runs-made").exists():
            self.fresh()
            made = self.call(["train", *RECIPE, "output.dir=runs-made", "output.name=made"])
            assert made.code == 0, made.said
            shutil.copytree(self.world / "runs-made", self.origin / "runs-made")
            (self.origin / "runs-made" / "made" / "report.html").unlink()

    def undisturbed(self, verb: Verb) -> tuple[Ended, dict[str, str]]:
        """Run a verb to its end; return how it went and what it left."""
        self.prepare(verb)
        before = self.fresh()
        ended = self.call(verb.command)
        assert ended.code == 0, f"{verb.command} ended with {ended.code}:\n{ended.said}"
        self.kept(f"{' '.join(verb.command[:4])} undisturbed")
        return ended, look(self.world, before)

    def kept(self, name: str) -> None:
        """Keep the world as it is."""
        if self.keep is not None:
            shutil.copytree(self.world, self.keep / name.replace("/", "-"), dirs_exist_ok=True)

    def kill(self, verb: Verb, at: int, emptied: bool, wanted: dict[str, str]) -> list[str]:
        """Kill a verb before a change, call it again, and return what is wrong with what is there then."""
        before = self.fresh()
        killed = self.call(verb.command, at, emptied)
        if killed.code != -signal.SIGKILL:
            return [f"was not killed, but ended with {killed.code}: {killed.said[-300:]}"]
        faults = [f"half written: {name}" for name in halves(self.world, verb, wanted)]
        command = verb.command
        if verb.resumed is not None and (self.world / verb.resumed[-1] / "run.json").exists():
            command = verb.resumed
        again = self.call(command)
        is_there = "exists already" in again.said or "is completed" in again.said
        if again.code != 0 and not (again.code == 2 and is_there):
            faults.append(f"again: exit code {again.code}: {' '.join(again.said[-400:].split())}")
        found = look(self.world, before)
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found:
                faults.append(f"missing: {name}")
            elif name not in wanted:
                faults.append(f"left over: {name}")
            elif found[name] != wanted[name]:
                faults.append(f"differs: {name}")
        return faults

    def points(self, changes: Changes) -> Iterator[tuple[int, bool]]:
        """Yield every point: before each change, and after each opening of a file."""
        for number, (event, _) in enumerate(changes, 1):
            yield number, False
            if event == "open":
                yield number, True

    def run(
        self, verb: Verb, every: int = 1, first: int = 0, say: Callable[[str], None] = lambda _: None
    ) -> Tally:
        """Try a verb's points.

        Args:
            verb: Which.
            every: Of how many points one is tried.
            first: The first of them, from 0.
            say: Told of each fault.
        """
        ended, wanted = self.undisturbed(verb)
        tally = Tally(len(ended.changes))
        for at, emptied in list(self.points(ended.changes))[first::every]:
            tally.points += 1
            faults = self.kill(verb, at, emptied, wanted)
            if faults:
                self.kept(f"{' '.join(verb.command[:4])} {at}")
                event, place = ended.changes[at - 1]
                where = f"{'just after' if emptied else 'before'} change {at} ({event} {place})"
                tally.faults.append(f"{where}: {'; '.join(faults[:4])}")
                say(tally.faults[-1])
        return tally


def import_all() -> None:
    """Import what the verbs import, so that forks need not."""
    names = (
        "peft transformers trl datasets accelerate safetensors.torch gguf diffusers matplotlib.pyplot psutil "
        "matplotlib.backends.backend_svg rich.console jinja2 typer transformers.models.llama.modeling_llama "
        "moslora.training.run moslora.comparison.compare moslora.evaluation.evaluate moslora.reports.again "
        "moslora.api.adapters moslora.adapters.export moslora.adapters.merge moslora.adapters.combine "
        "moslora.adapters.doctor moslora.adapters.inspection moslora.tasks.text.task moslora.tasks.text.trainer "
        "moslora.training.callbacks moslora.memory.plan moslora.cli moslora.models.gguf "
        "moslora.training.reload_proof.proof"
    )
    for name in names.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@contextlib.contextmanager
def warm_proofs() -> Iterator[None]:
    """Start the processes of proofs warm, too; the server is this process's, whatever is killed."""
    import moslora.training.reload_proof.proof as proof
    import warm

    original, server = proof.run_script, warm.Warm()
    server.start()
    proof.run_script = server.run
    try:
        yield
    finally:
        proof.run_script = original
        server.end()


def main() -> int:
    """Try verbs from the command line; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="*", metavar="VERB", help=", ".join(VERBS))
    parser.add_argument("--every", type=int, default=1, help="try one of so many points")
    parser.add_argument("--first", type=int, default=0, help="the first of them, from 0")
    parser.add_argument("--keep", type=Path, help="folder for worlds in which something was wrong")
    asked = parser.parse_args()
    unknown = [name for name in asked.verbs if name not in VERBS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    import_all()
    tallies = {}
    with tempfile.TemporaryDirectory() as folder, warm_proofs():
        trial = Trial(Path(folder), asked.keep)
        for name in asked.verbs or VERBS:
            began = time.monotonic()
            tally = tallies[name] = trial.run(
                VERBS[name],
                asked.every,
                asked.first,
                lambda line, name=name: print(f"  {name}: {line}", flush=True),
            )
            print(
                f"{name}: {tally.changes} changes, {tally.points} kills, {len(tally.faults)} faults, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    kills, faults = sum(t.points for t in tallies.values()), sum(len(t.faults) for t in tallies.values())
    print(f"In all {kills} kills of {len(tallies)} verbs, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
