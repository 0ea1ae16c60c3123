"""The files of a tokenizer beside a model or an adapter: what they say, and how two differ.

A trainer saves its tokenizer beside the adapter. Where tokens were added or the chat template was changed, the
adapter goes with that tokenizer and not with the base's. Files are compared by what they say; no tokenizer is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.files import sha256
from moslora.models.names import read_json

__all__ = ["TEMPLATES", "TokenizerFiles", "carry_tokenizer", "read_tokenizer"]

CONFIG, WHOLE = "tokenizer_config.json", "tokenizer.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# What holds the tokens themselves; with one of these, a folder has a tokenizer of its own.
VOCABULARIES = (
    WHOLE,
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "bpe.codes",
)
FILES = (
    *VOCABULARIES,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    TEMPLATE,
    "chat_template.json",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer, as the files of a folder have it.

    Attributes:
        folder: Where they are.
        names: The files, and those of further chat templates by their relative path.
        has_vocabulary: Whether it is a whole tokenizer; else it changes another's configuration or template.
        tokens: Ids by token, added ones included; None if no file here tells them.
        template: The chat template; None if there is none.
        digest: Of a vocabulary that cannot be read here, as of sentencepiece; empty if there is none.
    """

    folder: Path
    names: tuple[str, ...]
    has_vocabulary: bool
    tokens: Mapping[str, int] | None
    template: str | None
    digest: str

    def differences(self, base: TokenizerFiles) -> list[str]:
        """Say in what this tokenizer differs from the base's; nothing where it only lacks what the base has.

        Args:
            base: The base's.

        Returns:
            A text for each difference.
        """
        found = []
        if self.tokens is not None and base.tokens is not None and self.has_vocabulary:
            more = [token for token in self.tokens if token not in base.tokens]
            less = [token for token in base.tokens if token not in self.tokens]
            moved = [t for t, index in self.tokens.items() if base.tokens.get(t, index) != index]
            for names, what in ((more, "more"), (less, "fewer"), (moved, "with another id")):
                if names:
                    shown = ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
                    found.append(f"{len(names)} token{'s' * (len(names) > 1)} {what} ({shown})")
        elif self.digest and base.digest and self.digest != base.digest:
            found.append("another vocabulary")
        if (self.template != base.template) and (self.has_vocabulary or self.template is not None):
            found.append("another chat template" if self.template is not None else "no chat template")
        return found

    def beyond(self, rows: int) -> list[str]:
        """Return the tokens that have no row in an embedding.

        Args:
            rows: Of the embedding.
        """
        return [token for token, index in (self.tokens or {}).items() if index >= rows]


def read_tokenizer(folder: Path) -> TokenizerFiles | None:
    """Read what the tokenizer's files in a folder say.

    Args:
        folder: Of a model or an adapter.

    Returns:
        The tokenizer; None if there is no file of one.

    Raises:
        ModelError: If a file is damaged.
    """
    if not folder.is_dir():
        return None
    names = [name for name in FILES if (folder / name).is_file()]
    names += [str(path.relative_to(folder)) for path in sorted((folder / TEMPLATES).glob("*.jinja"))]
    if not names:
        return None
    vocabularies = [name for name in VOCABULARIES if name in names]
    tokens = dict(_tokens(folder, names))
    unread = [name for name in vocabularies if not name.endswith((".json", ".txt"))]
    return TokenizerFiles(
        folder,
        tuple(names),
        bool(vocabularies),
        tokens if vocabularies != unread or not vocabularies else None,
        _template(folder, names),
        "".join(sha256(folder / name) for name in unread),
    )


def _tokens(folder: Path, names: list[str]) -> Iterator[tuple[str, int]]:
    """Yield every token with its id."""
    if WHOLE in names:
        whole = read_json(folder / WHOLE)
        model = whole.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            yield from ((t, i) for t, i in vocabulary.items() if isinstance(i, int))
        elif isinstance(vocabulary, list):  # of a unigram model: token and score, in the order of ids
            yield from ((pair[0], i) for i, pair in enumerate(vocabulary) if isinstance(pair, list) and pair)
        yield from _added(whole.get("added_tokens"))
        return
    if "vocab.json" in names:
        yield from ((t, i) for t, i in read_json(folder / "vocab.json").items() if isinstance(i, int))
    if "vocab.txt" in names:
        lines = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        yield from ((token, index) for index, token in enumerate(lines))
    if "added_tokens.json" in names:
        yield from ((t, i) for t, i in read_json(folder / "added_tokens.json").items() if isinstance(i, int))
    decoder = read_json(folder / CONFIG).get("added_tokens_decoder") if CONFIG in names else None
    if isinstance(decoder, dict):
        yield from _added(
            [
                {**token, "id": int(i)}
                for i, token in decoder.items()
                if i.isdigit() and isinstance(token, dict)
            ]
        )


def _added(tokens: Any) -> Iterator[tuple[str, int]]:
    for token in tokens if isinstance(tokens, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield str(token.get("content")), token["id"]


def _template(folder: Path, names: list[str]) -> str | None:
    """Return the chat template, from where transformers takes it first."""
    if TEMPLATE in names:
        return (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", CONFIG):
        found = read_json(folder / name).get("chat_template") if name in names else None
        if isinstance(found, list):  # several by name
            named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def carry_tokenizer(own: TokenizerFiles, place: Path) -> None:
    """Put a tokenizer in the place of a copied base's.

    Args:
        own: What was found beside the adapter. A whole tokenizer replaces all files of the base's; what has no
            vocabulary lies over them.
        place: Where the base's files are.

    Raises:
        OSError: If it cannot be written.
    """
    if own.has_vocabulary:
        for name in FILES:
            (place / name).unlink(missing_ok=True)
        shutil.rmtree(place / TEMPLATES, ignore_errors=True)
    elif own.template is not None:  # else the base's file would hide a template in the configuration
        (place / TEMPLATE).unlink(missing_ok=True)
    for name in own.names:
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(own.folder / name, place / name)
