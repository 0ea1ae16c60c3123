"""Push: an adapter and its card onto the Hub, when a person says so, and nothing else of what lies beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moslora.adapters.cards.base_name import BaseName, is_path
from moslora.adapters.cards.card import README, Card, is_replaceable, render_card
from moslora.adapters.cards.measured import CARD_FACTS, read_measured
from moslora.adapters.cards.scrubbing import scrub
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import PROOF_FILE, ExportProof, proof_in_words
from moslora.adapters.factors import Adapter
from moslora.adapters.formats.directory import CONFIG, WEIGHTS
from moslora.adapters.formats.native import START
from moslora.adapters.formats.pipeline import folders
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.adapters.hub import Hub, token_of_this_machine
from moslora.bounded import read_header, read_json
from moslora.errors import AdapterError, HubError, UsageError
from moslora.files import scratch, sha256
from moslora.models.tokenizer_files import FILES as TOKENIZER
from moslora.models.tokenizer_files import TEMPLATES
from moslora.wording import size_in_words

__all__ = ["Pushed", "PushedFile", "adapter_of", "push_adapter"]

# What belongs to an adapter, by the name of the file; all else that lies there stays where it is.
OURS = (CONFIG, WEIGHTS, START, PROOF_FILE, CARD_FACTS, README)
BESIDE = (
    *TOKENIZER,
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)
MESSAGE = "Upload adapter with moslora"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]*")
# Files whose texts may name places of this machine.
TEXTUAL = (
    CONFIG,
    PROOF_FILE,
    CARD_FACTS,
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True)
class PushedFile:
    """A file that is uploaded.

    Attributes:
        name: Its path in the repository.
        size: In bytes.
        sha256: Of its content as it is uploaded.
        remark: In what it is not the file on disk; empty if it is that.
    """

    name: str
    size: int
    sha256: str
    remark: str = ""


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be.

    Attributes:
        files: In the order of their names.
        left_out: What lies beside the adapter and stays here.
        notes: What to know of it, as sentences.
        commit: The commit that was made; None where nothing was uploaded.
        url: Where it is; None likewise.
        verified: How many files the Hub was asked for, and gave with the same hash.
    """

    files: tuple[PushedFile, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    commit: str | None = None
    url: str | None = None
    verified: int = 0


def adapter_of(path: Path) -> Path:
    """Return the adapter that a path means: of a run directory its plain LoRA, else the path itself.

    Args:
        path: An adapter's folder or file, or a run directory.

    Raises:
        AdapterError: If a run has no plain LoRA.
    """
    if not (path / "run.json").is_file() or (path / CONFIG).is_file():
        return path
    lora = path / "lora"
    files = sorted(lora.glob("*.safetensors"))
    if (lora / CONFIG).is_file() or folders(lora):
        return lora
    if len(files) == 1:
        return files[0]
    raise AdapterError(
        f"{path} is a run without a plain LoRA (lora/): it has not ended. Name an adapter's folder."
    )


def push_adapter(
    adapter: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda _: None,
    bars: bool = False,
) -> Pushed:
    """Upload an adapter with its card, and compare what the Hub has with what was sent.

    Args:
        adapter: Its folder or file, or a run directory.
        repo: ``owner/name`` on the Hub; it is made if it does not exist.
        private: Whether only its owner sees it.
        revision: A branch, which is made if it does not exist; None for ``main``.
        base: Hub id of the base, where the adapter knows only a folder of this machine.
        dry_run: Find out what would be uploaded, and ask the Hub nothing.
        say: Receives a line before long work.
        bars: Whether to show how far each file is.

    Returns:
        What was uploaded.

    Raises:
        AdapterError: If the adapter cannot be read, or is broken.
        HubError: If the Hub cannot be reached, or refuses.
        UsageError: If an argument makes no sense, or there is no token.
    """
    if not REPO.fullmatch(repo) or len(repo) > 96 or ".." in repo or "--" in repo:
        raise UsageError(
            f"{repo!r} is not a name for a repository: write OWNER/NAME, as in ada/my-adapter, with letters, digits, "
            "'-', '_' and '.'."
        )
    if revision is not None and not REVISION.fullmatch(revision):
        raise UsageError(f"--revision {revision!r} is not the name of a branch.")
    if base is not None and (is_path(base) or not REPO.fullmatch(base)):
        raise UsageError(f"--base {base!r} is not a hub id. Write it as the Hub does, OWNER/NAME.")
    path = adapter_of(adapter)
    _refuse_broken(path, say)
    with _staged(path, repo, base) as (folder, staged):
        if dry_run:
            return staged
        token = token_of_this_machine()
        hub = Hub(token, repo, revision or "main")
        return _upload(hub, folder, staged, private, say, bars)


def _refuse_broken(path: Path, say: Callable[[str], None]) -> None:
    """Refuse an adapter that the doctor finds unusable."""
    found = diagnose(path, say=say)
    if not found.is_usable:
        faults = "\n".join(
            f"  {f.check}: {f.what}{f' {f.fix}' if f.fix else ''}"
            for f in found.findings
            if f.level == "error"
        )
        raise AdapterError(f"{path} is not uploaded: moslora doctor finds it not usable.\n{faults}")


# --- What is uploaded ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staged(path: Path, repo: str, base: str | None) -> Iterator[tuple[Path, Pushed]]:
    """Put what is uploaded into a folder of its own, without paths of this machine."""
    format_ = detect(path)
    found = read_adapter(path)
    known = _known_base(path, found, base)
    notes: list[str] = []
    with scratch("moslora-push") as folder:
        kept, left_out = _chosen(path)
        remarks: dict[str, str] = {}
        for name, source in kept.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.name in TEXTUAL and source.suffix == ".json":
                remarks[name] = _copy_scrubbed(source, target, known)
            else:
                shutil.copyfile(source, target)
            if source.suffix == ".safetensors" and any(
                is_path(v) for v in read_header(source).metadata.values()
            ):
                notes.append(
                    f"The head of {name} names paths of the machine that wrote it; moslora export writes none."
                )
        home = path if path.is_dir() else path.parent
        own = home / README
        if path.is_dir() and own.exists() and not is_replaceable(own):
            shutil.copyfile(own, folder / README)
            notes.append(f"{README} is yours and is uploaded as it is.")
        else:
            measured = read_measured(path)
            proofs = _proofs(path)
            card = Card(
                repo.partition("/")[2],
                format_,
                found,
                measured,
                proofs,
                "" if path.is_dir() else path.name,
                known.hub,
            )
            (folder / README).write_text(render_card(card), encoding="utf-8")
            remarks[README] = "written for this upload"
        if known.hub is None:
            notes.append(
                f"The base is not known by an id of the Hub{f' ({known.name})' if known.name else ''}: the card and "
                f"{CONFIG} do not name one, so that nothing loads the base by itself. Give it with --base OWNER/NAME."
            )
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        files = [
            PushedFile(n, (folder / n).stat().st_size, sha256(folder / n), remarks.get(n, "")) for n in names
        ]
        yield folder, Pushed(tuple(files), tuple(left_out), tuple(notes))


def _known_base(path: Path, adapter: Adapter, base: str | None) -> BaseName:
    """Return what the base is called on the Hub, by the caller, the run's record or the configuration."""
    return Card("", "lora", adapter, read_measured(path), hub_base=base).base


def _proofs(path: Path) -> list[str]:
    """Return what was proven when the adapter was written, from the file beside it."""
    try:
        value = read_json((path if path.is_dir() else path.parent) / PROOF_FILE) if path.is_dir() else {}
        names = {field.name for field in dataclasses.fields(ExportProof)}
        return [proof_in_words(ExportProof(**{k: v for k, v in value.items() if k in names}))]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def _chosen(path: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files of an adapter by their names, and the names of what lies beside them and is not of it."""
    if not path.is_dir():
        return {path.name: path}, []
    kept: dict[str, Path] = {}
    left_out: list[str] = []
    parts = {} if (path / CONFIG).is_file() else folders(path)
    for entry in sorted(path.iterdir()):
        if entry.name in parts:
            inside, rest = _chosen(entry)
            kept |= {f"{entry.name}/{name}": file for name, file in inside.items() if name != README}
            left_out += [f"{entry.name}/{name}" for name in rest]
        elif entry.name == TEMPLATES and entry.is_dir():
            kept |= {f"{TEMPLATES}/{file.name}": file for file in sorted(entry.glob("*.jinja"))}
        elif entry.is_file() and entry.name == README:
            continue  # yours, or written anew
        elif entry.is_file() and entry.name in (*OURS, *BESIDE):
            kept[entry.name] = entry
        else:
            left_out.append(f"{entry.name}/" if entry.is_dir() else entry.name)
    return kept, left_out


def _copy_scrubbed(source: Path, target: Path, base: BaseName) -> str:
    """Copy a file of JSON without paths of this machine; return in what the copy differs."""
    value = read_json(source)
    clean = scrub(value)
    if source.name == CONFIG and isinstance(value, dict):
        # A bare name of a folder would be looked for on the Hub, where it may be another model's.
        clean["base_model_name_or_path"] = base.hub
    if source.name == CARD_FACTS and isinstance(clean, dict):
        clean["base"] = dataclasses.asdict(base)
    if clean == value:
        shutil.copyfile(source, target)
        return ""
    target.write_text(json.dumps(clean, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if source.name == CONFIG:
        return f"base_model_name_or_path: {base.hub or 'none'}"
    return "paths of this machine shortened to names"


# --- The upload ---------------------------------------------------------------------------------------------


def _upload(
    hub: Hub, folder: Path, staged: Pushed, private: bool, say: Callable[[str], None], bars: bool
) -> Pushed:
    notes, files = list(staged.notes), list(staged.files)
    visible = hub.visibility()
    if visible == "public" and private:
        raise UsageError(
            f"{hub.repo} exists and is public, so --private would promise what is not so. Make it private on the "
            "Hub, or name another repository."
        )
    if visible is None:
        hub.create(private)
        say(f"Made {hub.repo}, {'private' if private else 'public'}.")
    hub.make_branch()
    theirs = hub.read_text(README)
    if theirs is not None and theirs != (folder / README).read_text(encoding="utf-8"):
        with scratch("moslora-push-readme") as place:
            (place / README).write_text(theirs, encoding="utf-8")
            if not is_replaceable(place / README):
                files = [file for file in files if file.name != README]
                notes.append(
                    f"The {README} of {hub.repo} was written by somebody, so it stays. Remove it there to have it "
                    "replaced."
                )
    say(f"Uploading {len(files)} files, {size_in_words(sum(file.size for file in files))} …")
    commit, url = hub.commit({file.name: folder / file.name for file in files}, MESSAGE, bars)
    _verify(hub, folder, files, commit)
    return dataclasses.replace(
        staged, files=tuple(files), notes=tuple(notes), commit=commit, url=url, verified=len(files)
    )


def _verify(hub: Hub, folder: Path, files: list[PushedFile], commit: str) -> None:
    """Compare the hashes of a commit's files with those of what was sent."""
    try:
        stored = hub.hashes([file.name for file in files], commit)
    except HubError as error:
        raise HubError(f"It was uploaded as commit {commit}, which is not proven. {error}") from error
    for file in files:
        content = folder / file.name
        wanted = {file.sha256, _git_blob(content)}
        if stored.get(file.name) not in wanted:
            raise HubError(
                f"The Hub's {file.name} at commit {commit} is not what was sent: "
                f"{'it is missing' if file.name not in stored else 'its hash is another'}. Push again."
            )


def _git_blob(path: Path) -> str:
    """Return the hash by which git names a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
