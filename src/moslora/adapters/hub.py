"""The Hub through huggingface_hub's client, its errors in words; nothing is asked of it before a call.

Seen in huggingface_hub 0.36 (requests), 1.x (httpx) and 2.4 (httpx2): each raises its own transport's errors, so that
they are told apart by the package they come from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moslora.errors import HubError, UsageError
from moslora.files import scratch
from moslora.wording import first_line

__all__ = ["Hub", "token_of_this_machine"]

TRANSPORTS = ("hf_xet", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
# What the Hub answers with → what to do.
ADVICE: Mapping[int, str] = {
    401: "The token is not accepted: it has expired, or is another Hub's. Make one with write access at "
    "https://huggingface.co/settings/tokens, then hf auth login.",
    403: "The token may not write there. Make one with write access, or name a repository that is yours.",
    404: "There is no such repository, or the token does not see it.",
    409: "Something else was committed at the same moment. Push again.",
    413: "A file is larger than the Hub takes.",
    429: "The Hub takes no more requests for now. Wait a little, and push again.",
}
LARGEST_TEXT = 4 << 20


def token_of_this_machine() -> str:
    """Return the token that huggingface_hub would use.

    Raises:
        UsageError: If there is none, or the Hub is switched off.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            "HF_HUB_OFFLINE is set, so nothing is uploaded. Unset it, or see what would be: --dry-run."
        )
    token = huggingface_hub.get_token()
    if not token:
        raise UsageError(
            "There is no token to upload with. Make one with write access at https://huggingface.co/settings/tokens, "
            "then run: hf auth login (or set HF_TOKEN). --dry-run shows what would be uploaded without one."
        )
    return token


class Hub:
    """One repository of the Hub, at one branch.

    Args:
        token: With write access.
        repo: ``owner/name``.
        revision: The branch.
    """

    def __init__(self, token: str, repo: str, revision: str) -> None:
        from huggingface_hub import HfApi

        self.api: Any = HfApi(token=token, library_name="moslora")
        self.repo, self.revision = repo, revision

    def visibility(self) -> str | None:
        """Return ``"public"`` or ``"private"``; None if there is no such repository that the token sees."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._in_words("looking for"):
            try:
                return "private" if self.api.model_info(self.repo).private else "public"
            except RepositoryNotFoundError as error:
                if _status(error) == 401:
                    raise
                return None

    def create(self, private: bool) -> None:
        """Make the repository."""
        with self._in_words("making"):
            self.api.create_repo(self.repo, private=private, exist_ok=True)

    def make_branch(self) -> None:
        """Make the branch, if it is another than ``main`` and does not exist."""
        if self.revision != "main":
            with self._in_words(f"making the branch {self.revision} of"):
                self.api.create_branch(self.repo, branch=self.revision, exist_ok=True)

    def read_text(self, name: str) -> str | None:
        """Return a file's text, None if there is no such file, or not one that can be read as text."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RevisionNotFoundError,
        )

        with self._in_words(f"reading {name} of"), scratch("moslora-hub") as folder:
            try:
                with _without_bars(True):
                    path = self.api.hf_hub_download(self.repo, name, revision=self.revision, local_dir=folder)
            except LocalEntryNotFoundError:  # the Hub did not answer, which says nothing of the file
                raise
            except (EntryNotFoundError, RevisionNotFoundError):
                return None
            content = Path(path).read_bytes()[: LARGEST_TEXT + 1]
        return content.decode("utf-8", "replace")

    def commit(self, files: Mapping[str, Path], message: str, bars: bool = False) -> tuple[str, str]:
        """Upload files in one commit.

        Args:
            files: By their path in the repository.
            message: Of the commit.
            bars: Whether the client shows how far each file is.

        Returns:
            The commit, and where it is.
        """
        from huggingface_hub import CommitOperationAdd

        adds = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        with self._in_words("uploading to"), _without_bars(not bars):
            done = self.api.create_commit(self.repo, adds, commit_message=message, revision=self.revision)
            return str(done.oid), str(done.commit_url)

    def hashes(self, names: Sequence[str], commit: str) -> dict[str, str]:
        """Return the hashes of files at a commit: SHA-256 of large ones, git's of the others.

        Args:
            names: Their paths.
            commit: The commit.
        """
        with self._in_words("reading back"):
            found = self.api.get_paths_info(self.repo, list(names), revision=commit)
            return {
                f.path: f.lfs.sha256 if f.lfs is not None else f.blob_id
                for f in found
                if hasattr(f, "blob_id")
            }

    @contextlib.contextmanager
    def _in_words(self, doing: str) -> Iterator[None]:
        """Turn what the client raises into one sentence with what to do."""
        try:
            yield
        except HubError:
            raise
        except Exception as error:
            # An upload of large files wraps what it ran into.
            refused = next((one for one in _chain(error) if _status(one) is not None), None)
            if refused is not None:
                raise self._refusal(doing, refused) from error
            if not any(map(_is_transport, _chain(error))):
                raise
            raise self._unreachable(doing, error) from error

    def _refusal(self, doing: str, error: BaseException) -> HubError:
        status = _status(error) or 0
        said = str(getattr(error, "server_message", None) or first_line(error)).rstrip(". ")
        advice = ADVICE.get(status, "Try again later." if status >= 500 else "")
        return HubError(f"The Hub refused {doing} {self.repo} ({status}): {said}. {advice}".rstrip())

    def _unreachable(self, doing: str, error: Exception) -> HubError:
        return HubError(
            f"{getattr(self.api, 'endpoint', 'The Hub')} cannot be reached while {doing} {self.repo}: "
            f"{first_line(error).rstrip('.')}. Check the connection (and HF_ENDPOINT, if it is set), and push again: a "
            "commit is made whole or not at all."
        )


@contextlib.contextmanager
def _without_bars(hidden: bool) -> Iterator[None]:
    """Keep the client's bars off the terminal inside the block."""
    import huggingface_hub.utils

    bars: Any = huggingface_hub.utils

    if not hidden or bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()


def _status(error: Any) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_transport(error: BaseException) -> bool:
    """Return whether an error says that the other side could not be reached."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return type(error).__module__.partition(".")[0] in TRANSPORTS
