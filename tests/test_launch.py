"""launch/: every file starts a command that exists, on as many hosts as its slice has."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from nd_jax import cli
from nd_jax.commands.train import resolve
from nd_jax.planning.chips import parse_topology

LAUNCH = Path(__file__).parents[1] / "launch"
ACCELERATORS = {"tpu-v5p-slice": "v5p", "tpu-v5-lite-podslice": "v5e", "tpu-v6e-slice": "v6e"}
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def options_of(words: list[str]):
    """What ``nd-jax train`` makes of them; nothing is run. Raises UserError for words it does not know."""
    assert words[:2] == ["nd-jax", "train"]
    target, rest, prog, _ = resolve(words[2:])
    return cli.parse(target, rest, prog)


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def check_jobset(manifest: dict) -> None:
    """The fields of jobset.x-k8s.io/v1alpha2 and batch/v1 that a slice needs, and that they fit each other."""
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    assert NAME.fullmatch(manifest["metadata"]["name"])
    assert set(manifest["spec"]) <= {"failurePolicy", "replicatedJobs", "successPolicy", "network", "suspend"}
    for job in manifest["spec"]["replicatedJobs"]:
        assert set(job) == {"name", "replicas", "template"}
        spec = job["template"]["spec"]
        assert spec["parallelism"] == spec["completions"]
        assert spec["backoffLimit"] == 0, "a slice with a lost host starts anew as a whole"
        pod = spec["template"]["spec"]
        selector, (container,) = pod["nodeSelector"], pod["containers"]
        generation = ACCELERATORS[selector["cloud.google.com/gke-tpu-accelerator"]]
        topology = parse_topology(f"{generation}:{selector['cloud.google.com/gke-tpu-topology']}")
        chips = container["resources"]["limits"]["google.com/tpu"]
        assert container["resources"]["requests"]["google.com/tpu"] == chips == topology.chip.per_host
        assert spec["parallelism"] * chips == topology.chips
        assert pod["restartPolicy"] in ("Never", "OnFailure")
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}


def test_the_jobset_asks_for_every_host_of_its_slice():
    check_jobset(jobset())


@pytest.mark.parametrize(
    "damage",
    [
        lambda spec: spec.update(parallelism=16, completions=16),
        lambda spec: spec.update(backoffLimit=6),
        lambda spec: spec["template"]["spec"]["nodeSelector"].update({"cloud.google.com/gke-tpu-topology": "4x4x4"}),
        lambda spec: spec["template"]["spec"]["volumes"].clear(),
    ],
)
def test_the_check_notices(damage):
    manifest = jobset()
    damage(manifest["spec"]["replicatedJobs"][0]["template"]["spec"])
    with pytest.raises(AssertionError):
        check_jobset(manifest)


def test_the_jobsets_command_is_one():
    pod = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    options = options_of([*container["command"], *container["args"]])
    mesh = options.settings.loop.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor * mesh.context == parse_topology("v5p:4x4x8").chips
    rows = options.settings.recipe.batch // sum(options.settings.recipe.stage_mix)
    assert rows % (mesh.data * mesh.fsdp) == 0
    assert pod["terminationGracePeriodSeconds"] >= 120, "a step and a checkpoint have to fit"
    folders = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert any(str(options.out).startswith(folder + "/") for folder in folders), "results must outlive the pod"


def sky() -> dict:
    return yaml.safe_load((LAUNCH / "sky.yaml").read_text())


def test_the_sky_task_has_known_fields_and_starts_training():
    task = sky()
    assert set(task) <= {"name", "resources", "envs", "workdir", "file_mounts", "setup", "run", "num_nodes", "config"}
    chips = int(re.fullmatch(r"tpu-v6e-(\d+)", task["resources"]["accelerators"])[1])
    assert task["file_mounts"]["/data"]["mode"] in ("MOUNT", "MOUNT_CACHED")
    assert set(re.findall(r"\$\{(\w+)\}", task["file_mounts"]["/data"]["source"])) <= set(task["envs"])
    line = next(line for line in task["run"].splitlines() if line.startswith("nd-jax train"))
    mesh = options_of(shlex.split(line)).settings.loop.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor * mesh.context == chips == parse_topology("v6e:16x16").chips


def test_the_sky_task_against_its_schema():
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    task = sky()
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    for mount in task["file_mounts"].values():
        jsonschema.validate(mount, schemas.get_storage_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**task, "nodes": 2}, schemas.get_task_schema())


@pytest.mark.parametrize("name", ["xpk.sh", "tpu_vm.sh", "slurm.sh"])
def test_scripts_parse_and_start_training(name):
    path = LAUNCH / name
    text = path.read_text()
    assert path.stat().st_mode & 0o100
    assert "set -euo pipefail" in text
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)
    default = re.search(r'^TRAIN=\$\{TRAIN:-"([^"]*)"\}$', text, re.MULTILINE)[1]
    options = options_of(shlex.split(default))
    assert str(options.out).startswith("/data/")


def test_the_tpu_vm_script_says_how_it_is_used():
    done = subprocess.run(
        ["bash", str(LAUNCH / "tpu_vm.sh"), "dance"],
        env={"PROJECT": "p", "ZONE": "z", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 2
    assert "create|install|train|delete" in done.stderr


def test_the_image_installs_what_is_pinned_with_libtpu():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1)[0] for line in lines if line and line[0].isalpha()]
    assert steps[0] == "FROM"
    assert set(steps) <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT"}
    assert any("-c constraints.txt" in line and '".[tpu]"' in line for line in lines)
    assert 'ENTRYPOINT ["nd-jax"]' in lines
