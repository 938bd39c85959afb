"""Several processes as one: joining the cluster that the environment describes, and doing some things only once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from nd_jax.errors import UserError

COORDINATOR, COUNT, INDEX = "ND_JAX_COORDINATOR", "ND_JAX_PROCESSES", "ND_JAX_PROCESS"
"""Environment variables for clusters that nothing else describes: HOST:PORT of the first, how many, and which."""
TPU_FILES = ("/dev/accel0", "/dev/vfio/0")
"""One of these exists on a host with TPUs."""


class Cluster(NamedTuple):
    """What describes the cluster, and the arguments of ``jax.distributed.initialize`` (none: JAX asks around)."""

    kind: str
    arguments: dict[str, Any]


def find_cluster(environment: Mapping[str, str], exists: Callable[[str], bool] = os.path.exists) -> Cluster | None:
    """The cluster that a process belongs to, or None for one on its own.

    In this order: the variables above; SLURM, inside ``srun`` with several tasks; GKE, whose webhook tells every pod of
    a slice who the others are; a TPU VM, which asks its metadata server. Raises UserError for variables that make no
    cluster.
    """
    given = [name for name in (COORDINATOR, COUNT, INDEX) if environment.get(name)]
    if given:
        return Cluster("variables", _given(environment, given))
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Cluster("slurm", {})
    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if environment.get("JAX_PLATFORMS", "tpu").startswith("cpu"):
        return None
    if "TPU_WORKER_ID" in environment and (len(hosts) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environment):
        return Cluster("gke", {})
    if any(exists(path) for path in TPU_FILES) and len(hosts) != 1:
        return Cluster("tpu vm", {})
    return None


def _given(environment: Mapping[str, str], given: list[str]) -> dict[str, Any]:
    if len(given) < 3:
        missing = [name for name in (COORDINATOR, COUNT, INDEX) if name not in given]
        raise UserError(f"{', '.join(given)} is set, {' and '.join(missing)} is not; expected all three or none")
    address, count, index = (environment[name] for name in (COORDINATOR, COUNT, INDEX))
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(
            f"{COORDINATOR}={address}, {COUNT}={count}, {INDEX}={index}; expected HOST:PORT, a number of processes and "
            "a lower index"
        )
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


def join_cluster() -> str | None:
    """Joins, unless this process is on its own or has joined before; returns what described the cluster.

    To be called before anything asks for devices. Raises UserError when the others cannot be reached.
    """
    found = find_cluster(os.environ)
    if found is None or jax.distributed.is_initialized():
        return None
    try:
        jax.distributed.initialize(**found.arguments)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"cannot join the cluster that {found.kind} describes ({lines[0]}); check that every process was started "
            "and that the coordinator's port is open"
        ) from error
    return found.kind


def is_leader() -> bool:
    """Whether this process is the one that writes and talks."""
    return jax.process_index() == 0


def once(work: Callable[[], Any], name: str) -> None:
    """Runs ``work`` on the first process; the others wait for it, so that afterwards all see what it left.

    Where it fails every process fails: the first with its error, the others with a UserError.
    """
    error: Exception | None = None
    if is_leader():
        try:
            work()
        except Exception as failed:
            error = failed
    raise_together(error, f"{name} failed on process 0, whose message says why")


def raise_together(error: Exception | None, told: str) -> None:
    """Raises the first process's ``error``, if it has one, there, and a UserError that says ``told`` on the others."""
    if jax.process_count() > 1:
        import numpy as np
        from jax.experimental import multihost_utils

        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(error is not None)))
        if failed and error is None:
            error = UserError(told)
    if error is not None:
        raise error
