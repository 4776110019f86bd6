"""Keeps compiled programs in a folder of the user's cache, so that the next run starts at once."""

import hashlib
import os
import platform
import stat
from pathlib import Path

import jax

from loft_jax.files import cache_folder

_MOST_BYTES = 2 * 2**30  # beyond, JAX removes what was used longest ago; a program takes megabytes


def keep_compiled_programs() -> Path | None:
    """Turns JAX's persistent compilation cache on, unless the user has set one or turned it off.

    A process that can write to the cache decides what other processes run, so the folder is the
    user's alone. JAX locks it, so several processes can use it at once. But the hosts of one run
    may find different programs in theirs, so these have the cache that the user sets, or none.

    Returns:
        Folder of the cache; None if the user's settings of JAX are used, or if there can be none.
    """
    folder, enabled = (
        getattr(jax.config, f"jax_{name}")
        for name in ("compilation_cache_dir", "enable_compilation_cache")
    )
    if folder or "JAX_COMPILATION_CACHE_DIR" in os.environ or not enabled:
        return None
    if jax.distributed.is_initialized() or not (programs := cache_folder("programs")):
        return None
    folder = programs / _this_cpu()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(folder):
            return None
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    return folder


def _this_cpu() -> str:
    """Names the instructions that programs are compiled for: hosts may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.blake2b(features.encode(), digest_size=4).hexdigest()
    return f"{platform.machine()}-{digest}"


def _is_private(folder: Path) -> bool:
    """Whether a folder is this user's, and nobody else can write to it."""
    status = folder.stat()
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not writable and os.access(folder, os.W_OK)
