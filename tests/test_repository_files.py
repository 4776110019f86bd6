"""Hooks and workflows run what make runs, so that there is one list of checks."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_hooks_are_the_checks_that_make_runs_before_the_tests():
    recipes = dict(re.findall(r"^(\w+):.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE))
    fetched, *lint, others = recipes["test"].splitlines()
    assert fetched.endswith("--jobs=2 .venv/.test assets")
    assert others.endswith("--jobs=2 types site tests")
    commands = [*lint, *recipes["types"].splitlines()]
    checks = [command.replace("\t$(BIN)", ".venv/bin") for command in commands]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]] == checks


def test_workflows_make_targets_that_there_are():
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))
    used = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        commands = [step.get("run", "") for job in jobs for step in job.get("steps", ())]
        used |= {target for command in commands for target in re.findall(r"make ([\w-]+)", command)}
    assert {"test", "test-versions"} <= used <= targets
