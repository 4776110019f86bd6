import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

STAND_INS = Path(__file__).parent / "stand_ins"


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder that stands in for gcloud, with hosts as folders in it."""
    programs = shutil.copytree(STAND_INS, tmp_path / "bin")
    for program in programs.iterdir():
        # Whatever Python runs the tests runs gcloud too.
        text = program.read_text().replace("#!/usr/bin/python3", f"#!{sys.executable}", 1)
        program.write_text(text)
        program.chmod(0o755)
    source = tmp_path / "source"
    source.mkdir()
    git = ["git", "-C", str(source), "-c", "user.name=n", "-c", "user.email=e"]
    (source / "kept.txt").write_text("before")
    (source / ".env").write_text("secret")
    for words in (["init", "-q"], ["add", "kept.txt"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setenv("CLOUD", str(tmp_path))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    yield tmp_path
    for file in tmp_path.glob("host*/loft-jax/run.pid"):
        if (number := file.read_text().strip()) and Path(f"/proc/{number}").exists():
            os.kill(int(number), signal.SIGKILL)
