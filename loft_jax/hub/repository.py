"""Uploads folders to repositories of the Hugging Face hub."""

import logging
from pathlib import Path

from loft_jax.errors import explained

_log = logging.getLogger(__name__)


def open_repository(name: str) -> None:
    """Makes a repository of models, private, or checks that an existing one can be written to.

    Called before the work whose result is to be uploaded.

    Args:
        name: `"org/name"`, or `"name"` for the user's own.

    Raises:
        InputError: The name is not valid, the hub cannot be reached, or the user may not write.

    Example:
        >>> open_repository("org/my adapter")
        Traceback (most recent call last):
        loft_jax.errors.InputError: org/my adapter: the Hugging Face hub gives no repository of ...
    """
    from huggingface_hub import HfApi

    with explained(
        f"{name}: the Hugging Face hub gives no repository of this name to write to (`hf auth "
        "login` says who you are)"
    ):
        repository = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().auth_check(repository.repo_id, write=True)


def push_folder(folder: Path, name: str) -> None:
    """Uploads the files of a folder as one commit.

    Args:
        folder: Its files replace those of the same name in the repository.
        name: Of a repository; see `open_repository`.

    Raises:
        InputError: The upload failed; the message says how to try again.
    """
    from huggingface_hub import HfApi

    with explained(
        f"{folder} is written, but was not uploaded; `hf upload {name} {folder}` tries again"
    ):
        repository = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            ignore_patterns=[".*"],
            commit_message="Upload with loft_jax",
        )
    _log.info("uploaded %s to %s", folder, repository)
