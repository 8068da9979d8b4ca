"""Backends: what runs the stages of `hm run`, and for which clusters there are manifests.

To add one, write its module in this folder and add it to `RUN_BACKENDS` or `MANIFEST_BACKENDS`.
"""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hm_reco.lake.runs import StageRun
from hm_reco.lake.storage import Lake

if TYPE_CHECKING:
    from runner.display import RunDisplay
    from runner.hooks import Hooks
    from runner.stage import Job


@dataclass(frozen=True)
class RunOptions:
    """How the jobs of a run are executed."""

    jobs: int = 2  # at the same time
    force: bool = False  # run unchanged stages, too
    wait: float | None = None  # seconds to wait for a lease; None: without limit


class RunBackend(Protocol):
    """Runs the stages of a run."""

    def __call__(
        self,
        lake: Lake,
        jobs: "Sequence[Job]",
        display: "RunDisplay",
        hooks: "Hooks",
        options: RunOptions,
    ) -> list[StageRun]:
        """Run the jobs; return their stage runs. Raises `StageError` if one did not succeed."""


def run_locally(
    lake: Lake,
    jobs: "Sequence[Job]",
    display: "RunDisplay",
    hooks: "Hooks",
    options: RunOptions,
) -> list[StageRun]:
    """Run jobs in processes of this machine while holding the leases of their stages."""
    from hm_reco.lake.lease import hold_leases
    from runner.scheduler import run_jobs

    def on_lost() -> None:
        display.log("another run took over the lease: stopping this run", "red")
        os.kill(os.getpid(), signal.SIGTERM)

    names = [job.stage.name for job in jobs]
    with hold_leases(lake, names, options.wait, display.log, on_lost):
        return run_jobs(lake, jobs, display, hooks, options.jobs, options.force)


def run_on_ray(
    lake: Lake,
    jobs: "Sequence[Job]",
    display: "RunDisplay",
    hooks: "Hooks",
    options: RunOptions,
) -> list[StageRun]:
    """Run each stage as a job of the cluster HM_RAY_ADDRESS."""
    from runner.backends.ray import run_on_ray as run

    return run(lake, jobs, display, hooks, options.jobs, options.force)


RUN_BACKENDS: dict[str, RunBackend] = {"local": run_locally, "ray": run_on_ray}


def get_run_backend(name: str) -> RunBackend:
    """Return the backend of this name. Raises `ValueError` for any other name."""
    if name not in RUN_BACKENDS:
        raise ValueError(f"--backend {name}: expected {' or '.join(RUN_BACKENDS)}")
    return RUN_BACKENDS[name]


@dataclass(frozen=True)
class ManifestBackend:
    """A kind of cluster that runs the graph of stages from a manifest."""

    path: Path  # of the manifest in a checkout
    build: Callable[[Sequence[Any]], str]  # from the steps to YAML


def _build_argo(steps: Sequence[Any]) -> str:
    from runner.backends.argo import NIGHTLY_SCHEDULE, build_workflows

    return build_workflows(steps, NIGHTLY_SCHEDULE)


def _build_ray(steps: Sequence[Any]) -> str:
    from runner.backends.kuberay import build_ray_job

    return build_ray_job(steps)


MANIFEST_BACKENDS = {
    "argo": ManifestBackend(Path("deploy/pipeline/base/workflow.yaml"), _build_argo),
    "ray": ManifestBackend(Path("deploy/ray/base/rayjob.yaml"), _build_ray),
}
