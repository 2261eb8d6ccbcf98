"""Base of the results of all stages, which save themselves into a folder or to the hub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from regraft.errors import OutputError
from regraft.models.quiet import in_one_line, quiet
from regraft.plans import Provenance


class Saving(ABC):
    """A result that holds a model or an adapter."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path, *, replace: bool = False) -> Provenance:
        """Saves everything that belongs to the result into a new or empty folder, and returns the record as it was written."""

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None) -> str:
        """Saves the result to a repository on the Hugging Face hub; the arguments are those of :func:`upload`.

        Raises:
            OutputError: The hub cannot be reached, or refuses.
        """
        with TemporaryDirectory(prefix="regraft-") as work:
            folder = Path(work) / "result"
            self.save_pretrained(folder)
            return upload(folder, repo_id, private=private, token=token, revision=revision)


def upload(folder: Path, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None) -> str:
    """Commits a folder to a repository on the Hugging Face hub, which is created if it does not exist.

    Args:
        folder: What is committed.
        repo_id: Such as ``name/model``.
        private: Whether a new repository is private; None for the owner's default on the hub.
        token: Access token for the hub; None for that of ``hf auth login``.
        revision: Branch to commit to; None: the main branch.

    Returns:
        The address of the commit.

    Raises:
        OutputError: The hub cannot be reached, or refuses.
    """
    api = HfApi(token=token)
    try:
        with quiet():
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload by regraft")
    except Exception as error:  # the hub's client lets many kinds through: sockets, certificates, its own
        raise OutputError(
            f"'{repo_id}' cannot be written to the hub: {in_one_line(error)}; check the name, and log in with: hf auth login"
        ) from None
    return str(commit)
