"""Runs the fast tests at the oldest and the newest versions that `pyproject.toml` allows.

On Python 3.11, 3.12 and 3.13, where they are installed; each environment is a folder under .venvs
with the log of its tests. One that passed is not run again until the package, the tests or the
ranges change, so that a run that was stopped goes on where it was. Nothing here needs torch, which
would take most of the time and of the disk: what is compared with torch and PEFT is in `make test`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venvs"
PYTHONS = ("3.11", "3.12", "3.13")
# Oldest are the floors of what pyproject.toml names, with the newest of what those need.
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
SHOWN = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "datasets")
TESTS = (
    "tests/test_patterns.py",
    "tests/optim/test_full_rank.py",
    "tests/optim/test_imports.py",
    "tests/optim/test_linear_algebra.py",
    "tests/optim/test_oracle.py",
    "tests/optim/test_pairs.py",
    "tests/optim/test_stacking.py",
    "tests/optim/test_state.py",
    "tests/lora/test_config.py",
    "tests/lora/test_inject.py",
    "tests/lora/test_targets.py",
    "tests/data/test_templates.py",
    "tests/data/test_chat.py",
    "tests/data/test_stream.py",
    "tests/cli/test_help.py",
    "tests/cli/test_unknown_flags.py",
    "tests/training/test_checkpoint.py",
    "tests/training/test_config.py",
)
WITHOUT_TORCH = ("-k", "not peft")


def main() -> int:
    """Tests every environment.

    Returns:
        The exit code; 1 if the tests of an environment fail, or it cannot be made.
    """
    tested = _digest()
    failed = 0
    for python in PYTHONS:
        found = interpreter(python)
        if found is None:
            print(f"{python}: not installed", flush=True)
            continue
        for end, resolution in RESOLUTIONS.items():
            folder = ENVIRONMENTS / f"{end}-{python}"
            passed = folder / "passed"
            if passed.is_file() and passed.read_text() == tested:
                print(f"{folder.name}: passed before", flush=True)
                continue
            start = time.monotonic()
            error = _made(folder, found, resolution) or _tested(folder)
            failed += bool(error)
            if not error:
                passed.write_text(tested)
            minutes = (time.monotonic() - start) / 60
            print(
                f"{folder.name}: {error or 'passed'} ({minutes:.1f} min; {_versions(folder)})",
                flush=True,
            )
    return int(failed > 0)


def interpreter(python: str) -> str | None:
    """Finds an interpreter that runs: on PATH, or one of pyenv's, whose shims may not."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [f"python{python}", *sorted(pyenv.glob(f"versions/{python}.*/bin/python"))]
    for name in map(str, found):
        path = shutil.which(name)
        if path and not subprocess.run([path, "-V"], capture_output=True, check=False).returncode:
            return path
    return None


def _uv(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "uv", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _made(folder: Path, python: str, resolution: str) -> str:
    """Makes an environment; gives the error, or nothing."""
    into = ("pip", "install", "--python", str(folder))
    only_wheels = ("--only-binary", ":all:", "--no-binary", "loft-jax")
    for arguments in (
        ("venv", "--clear", "--python", python, str(folder)),
        (*into, "--resolution", resolution, *only_wheels, "--editable", ".[quantized]"),
        (*into, "pytest", "pytest-xdist", "hypothesis", "scikit-learn"),
    ):
        found = _uv(*arguments)
        if found.returncode:
            return f"uv {arguments[0]} failed: {found.stderr.strip()}"
    return ""


def _tested(folder: Path) -> str:
    """Runs the tests in an environment; gives the error, or nothing."""
    log = folder / "tests.log"
    options = ("-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--tb=short")
    command = [str(folder / "bin" / "python"), "-m", "pytest", *options, *WITHOUT_TORCH, *TESTS]
    with log.open("w") as stream:
        code = subprocess.run(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False
        ).returncode
    return f"failed, see {log.relative_to(ROOT)}" if code else ""


def _versions(folder: Path) -> str:
    lines = _uv("pip", "freeze", "--python", str(folder)).stdout.splitlines()
    found = dict(line.split("==", 1) for line in lines if "==" in line)
    return ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)


def _digest() -> str:
    """A digest of the package, its ranges and its tests."""
    files = [ROOT / "pyproject.toml", Path(__file__)]
    files += sorted(path for room in ("loft_jax", "tests") for path in (ROOT / room).rglob("*.py"))
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.read_bytes())
    return whole.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
