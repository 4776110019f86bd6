"""`install` sends what git tracks, with its edits, to every host."""

import subprocess

from tests.scripts.tpu.cloud import act, on_linux

pytestmark = on_linux


def test_launch_says_that_nothing_is_installed(cloud):
    assert act(cloud, "up").returncode == 0
    found = act(cloud, "launch", "--", "--output", "o")
    assert found.returncode == 1
    assert "loft-jax is not installed" in found.stderr


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
