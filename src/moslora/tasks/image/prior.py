"""Prior preservation (DreamBooth, arXiv:2208.12242): pictures of the subject's class, which the base itself draws."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moslora.data.pictures import SUFFIXES
from moslora.errors import UsageError
from moslora.files import replaced_file, write_text
from moslora.models.names import read_json
from moslora.tasks.image.folders import Folder

__all__ = ["ClassPictures"]

GENERATED = "generated.json"  # beside the pictures: which of them the base drew, and from what
FIRST_SEED = 1_000_000  # added to the run's seed, so that no class picture has the noise of a shown one


class ClassPictures:
    """The folder of class pictures: which exist, and which are still to be generated.

    The user's own pictures come first; generated ones fill the folder up to ``count``. A record beside them keeps a
    folder from being used with pictures of another base or prompt.

    Args:
        folder: The folder; it need not exist.
        prompt: What the pictures show.
        count: How many are used.
        base: The base's name, as in the recipe.
        read: Reads the folder's pictures with that prompt, at most so many: ``read_folder``, its other arguments set.
        warn: Told of pictures that are not used.

    Attributes:
        pictures: Those that exist; None if there are none.
        missing: Numbers of those to be generated.

    Raises:
        UsageError: If the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        prompt: str,
        count: int,
        base: str,
        read: Callable[[Path, int], Folder],
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder, self.prompt, self.count, self.base = folder, prompt, count, base
        self._read, self._warn = read, warn
        self.pictures: Folder | None = None
        self.missing: list[int] = []
        self.refresh()

    def refresh(self) -> None:
        """Look at the folder again; another process may have generated pictures since."""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"data.class_images: {folder} is a file; name a folder.")
        generated = self._record()["files"]
        files = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
        files = [
            path for path in files if not path.name.startswith(".")
        ]  # being written, or the file manager's
        own = [path for path in files if path.name not in generated and path.name != GENERATED]
        self.pictures = None
        if own or generated:
            self.pictures = self._read(folder, self.count)
            changed = [
                picture.path.name
                for picture in self.pictures.pictures
                if generated.get(picture.path.name, picture.sha256) != picture.sha256
            ]
            if changed:
                raise UsageError(
                    f"{folder / changed[0]} is not what was generated; remove it to generate it again."
                )
        if sum(path.suffix.lower() in SUFFIXES for path in files) > self.count:
            self._warn(
                f"{folder} has more pictures than data.class_count={self.count}; the first by name are used."
            )
        numbers = [number for number in range(self.count) if _file_name(number) not in generated]
        self.missing = numbers[: max(0, self.count - (len(self.pictures.pictures) if self.pictures else 0))]

    def generate(
        self,
        draw: Callable[[str, int], bytes],
        seed: int,
        checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        """Generate the missing pictures, each written whole, and read all of them.

        Args:
            draw: Makes a PNG file of a prompt and a seed.
            seed: The run's.
            checkpoint: Called after each picture; what it interrupts continues with the next missing one.
        """
        if self.missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            record = self._record()
            for number in self.missing:
                content = draw(self.prompt, seed + FIRST_SEED + number)
                path = self.folder / _file_name(number)
                # The record first: a picture that is not in it counts as the user's own.
                record["files"][path.name] = hashlib.sha256(content).hexdigest()
                write_text(self.folder / GENERATED, json.dumps(record, indent=1) + "\n")
                with replaced_file(path) as part:
                    part.write_bytes(content)
                checkpoint()
            self.refresh()

    def fingerprint(self) -> str:
        """Return what identifies the user's own pictures, or ``"generated"`` if there are none.

        Generated ones are identified by base and prompt; a changed file was refused already.
        """
        generated = self._record()["files"]
        existing = self.pictures.pictures if self.pictures else ()
        return "".join(p.sha256 for p in existing if p.path.name not in generated) or "generated"

    def _record(self) -> dict[str, Any]:
        """Return which pictures the base drew, with their hashes; refuse those of another base or prompt."""
        origin = {"prompt": self.prompt, "base": self.base}
        path = self.folder / GENERATED
        if not path.is_file():
            return {**origin, "files": {}}
        record = read_json(path)
        for key, value in origin.items():
            if record.get(key) != value:
                raise UsageError(
                    f"The pictures in {self.folder} were generated with the {key} {record.get(key)!r}, not {value!r}; "
                    "name another folder in data.class_images."
                )
        files = {name: sha256 for name, sha256 in record["files"].items() if (self.folder / name).is_file()}
        return {**origin, "files": files}


def _file_name(number: int) -> str:
    return f"generated-{number:05d}.png"
