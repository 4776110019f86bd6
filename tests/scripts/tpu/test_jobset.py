"""The JobSet for GKE: its hosts, volumes and settings fit together, and its pods resume."""

import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from loft_jax.training.config_io import config_from_dict, load_config

JOBSET = Path(__file__).parents[3] / "scripts" / "tpu_jobset.yaml"


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
