"""What a card calls a base model: its id on the Hub, or a name without the path of the machine it was trained on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from moslora.bounded import read_text
from moslora.models.names import HUB_ID, PACKAGED

__all__ = ["BaseName", "bare_name", "base_name", "is_path", "license_of"]

LARGEST_README = 1 << 20
# What a folder that was made of a GGUF file is called in the cache.
_CONVERTED = re.compile(r"(?P<stem>.+)-[0-9a-f]{16}-(?:float32|bfloat16|float16)-transformers-\S+")
# A license as the Hub's metadata has it.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass(frozen=True)
class BaseName:
    """What a base model is called.

    Attributes:
        name: For people: a hub id, a packaged name, or the last part of a path.
        hub: Its id on the Hub; None if it is not known.
        license: As the Hub writes it; None if it is not known.
        remark: What else must be known of the base that was used.
    """

    name: str
    hub: str | None = None
    license: str | None = None
    remark: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BaseName:
        """Read what ``dataclasses.asdict`` made of one; what has another type is left out."""
        text = {
            key: v for key in ("name", "hub", "license", "remark") if isinstance(v := value.get(key), str)
        }
        hub = text.get("hub")
        return cls(
            bare_name(text.get("name", "")),
            hub if hub and HUB_ID.fullmatch(hub) else None,
            _plain_license(text.get("license")),
            text.get("remark", ""),
        )


def is_path(name: str) -> bool:
    """Return whether a text is a path of a file system, which says something of a machine.

    Args:
        name: Any text.
    """
    if "\n" in name or not name:
        return False
    if name.startswith(("/", "~", "./", "../", ".\\", "..\\", "file:")) or re.match(
        r"[A-Za-z]:[\\/]|\\\\", name
    ):
        return True
    return bool(
        ("/" in name or "\\" in name) and not HUB_ID.fullmatch(name) and "://" not in name and " " not in name
    )


def bare_name(name: str) -> str:
    """Return a name without the folders that it lies in.

    Args:
        name: A hub id, which stays, or a path.
    """
    if not is_path(name):
        return name
    last = PureWindowsPath(name).name if "\\" in name else PurePosixPath(name).name
    return last or "local"


def base_name(name: str, hub: str | None = None) -> BaseName:
    """Find out what a base is called where it is published.

    Args:
        name: As a recipe or ``adapter_config.json`` has it: packaged name, hub id, folder or GGUF file.
        hub: Its hub id, where the caller knows it.

    Returns:
        The name; nothing of it is a path.
    """
    packaged = PACKAGED.get(name)
    converted = _CONVERTED.fullmatch(bare_name(name))
    stem = converted["stem"] if converted else ""
    if packaged is None:
        packaged = next((p for p in PACKAGED.values() if stem and stem == _stem(p.file)), None)
    if packaged is not None:
        remark = f"Its weights came from {packaged.file}, dequantized; those of the Hub's model are not rounded so."
        called = next(key for key, value in PACKAGED.items() if value is packaged)
        return BaseName(called, hub or packaged.origin, packaged.licence.lower(), remark)
    if hub is not None:
        return BaseName(bare_name(name) or hub, hub, license_of(name) or license_of(hub))
    is_there = Path(name).expanduser().exists() if name and not name.startswith("~") else False
    if HUB_ID.fullmatch(name) and not is_there:
        return BaseName(name, name, license_of(name))
    return BaseName(stem or bare_name(name), None, license_of(name) if is_there else None)


def _stem(file: str) -> str:
    return re.sub(r"[^\w.-]+", "-", file.removesuffix(".gguf")).lower()


def license_of(base: str) -> str | None:
    """Return the license that a base's own card names; None if that is not on this machine, or names none.

    Args:
        base: A folder, or a hub id that has been downloaded.
    """
    try:
        found: Path | None = Path(base).expanduser() / "README.md"
        if found is None or not found.is_file():
            found = _cached_card(base) if HUB_ID.fullmatch(base) else None
        if found is None:
            return None
        return _plain_license(front_matter(read_text(found, LARGEST_README)).get("license"))
    except (OSError, ValueError, RuntimeError):  # a card that cannot be read says nothing
        return None


def _cached_card(repo: str) -> Path | None:
    """Return the card of a model in huggingface_hub's cache, whose import takes longer than a verb at rest."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = cache / f"models--{repo.replace('/', '--')}"
    commit = read_text(folder / "refs" / "main", 100).strip()
    card = folder / "snapshots" / commit / "README.md"
    return card if re.fullmatch(r"[0-9a-f]{40}", commit) and card.is_file() else None


def _plain_license(value: Any) -> str | None:
    return value if isinstance(value, str) and _LICENSE.fullmatch(value) else None


def front_matter(text: str) -> dict[str, Any]:
    """Read the YAML at the head of a card; empty if there is none.

    Args:
        text: All of the card.
    """
    import yaml

    found = re.match(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", text, re.DOTALL)
    if found is None:
        return {}
    try:
        value = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError, ValueError):  # a card that somebody wrote
        return {}
    return value if isinstance(value, dict) else {}
