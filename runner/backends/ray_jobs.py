"""Run commands as jobs of a Ray cluster with the requested resources, and forward their output.

Ray's job server starts a command on a machine with the CPUs, the memory and the GPUs that it
requests, stores its output, and continues when the connection is lost. Only the command is sent:
the machines have the code (the project's image, or the same checkout) and their own credentials,
and access the lake by its URI.
https://docs.ray.io/en/latest/cluster/running-applications/job-submission/index.html
"""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from hm_reco.lake.runs import JOB_URL_VARIABLE
from hm_reco.lake.settings import Settings

DASHBOARD_PORT = 8265  # of the dashboard with the job server
POLL_SECONDS = 0.5  # between two polls of a job


class BackendError(RuntimeError):
    """The cluster is not configured, does not exist or cannot be reached."""


def get_dashboard_url(settings: Settings) -> str:
    """Return the URL of the cluster's dashboard: from the settings, or at Ray's default port."""
    if settings.ray_dashboard:
        return settings.ray_dashboard.rstrip("/")
    host = settings.ray_address.removeprefix("ray://").rpartition(":")[0] or "127.0.0.1"
    return f"http://{host}:{DASHBOARD_PORT}"


@dataclass(frozen=True)
class Resources:
    """The resources that a command needs on its machine."""

    cpus: float = 1
    memory: str = "8Gi"
    gpu: int = 0

    def to_options(self) -> dict[str, Any]:
        """Convert to Ray's job options; memory in bytes."""
        units = {"Mi": 2**20, "Gi": 2**30}
        memory = int(self.memory[:-2]) * units[self.memory[-2:]]
        return {
            "entrypoint_num_cpus": self.cpus,
            "entrypoint_memory": memory,
            "entrypoint_num_gpus": self.gpu,
        }


def get_job_client(dashboard: str) -> Any:
    """Connect to the job server at `dashboard`. Raises `BackendError` when there is none."""
    try:
        from ray.job_submission import JobSubmissionClient
    except ModuleNotFoundError as err:
        raise BackendError("Ray is not installed: hm-reco[cluster]") from err
    try:
        return JobSubmissionClient(dashboard)
    except (ConnectionError, RuntimeError) as err:
        raise BackendError(
            f"no Ray dashboard at {dashboard}; set HM_RAY_DASHBOARD to the URL that accepts jobs"
        ) from err


def run_job(
    client: Any,
    name: str,
    args: Sequence[str],
    resources: Resources,
    on_output: Callable[[str], object] = print,
    should_continue: Callable[[], bool] = lambda: True,
) -> tuple[str, str]:
    """Run a command as a job; returns its status (SUCCEEDED, FAILED, STOPPED) and Ray's message.

    The command gets the cluster in `HM_RAY_ADDRESS` and the URL of the job's page in `HM_JOB_URL`.
    """
    job_id, forwarded = f"{name}-{uuid4().hex[:6]}", ""
    environment = (
        "HM_RAY_ADDRESS=auto",
        f"{JOB_URL_VARIABLE}={client.get_address()}/#/jobs/{job_id}",
    )
    entrypoint = shlex.join(["env", *environment, *args])
    client.submit_job(entrypoint=entrypoint, submission_id=job_id, **resources.to_options())
    while not (status := client.get_job_status(job_id)).is_terminal():
        if not should_continue():
            client.stop_job(job_id)
            if status.value == "PENDING":  # it will not run, but Ray keeps it in its queue
                return "STOPPED", _read_message(client, job_id)
        # while the job waits, Ray's message has the reason
        forwarded = _forward_output(
            forwarded, _read_logs(client, job_id) or _read_message(client, job_id), on_output
        )
        time.sleep(POLL_SECONDS)
    _forward_output(forwarded, _read_logs(client, job_id), on_output)
    return str(status.value), _read_message(client, job_id)


def _read_logs(client: Any, job_id: str) -> str:
    return str(client.get_job_logs(job_id))


def _read_message(client: Any, job_id: str) -> str:
    return client.get_job_info(job_id).message or ""


def _forward_output(forwarded: str, text: str, on_output: Callable[[str], object]) -> str:
    """Forward the output that was not forwarded yet; returns all of it."""
    new_text = text.removeprefix(forwarded)
    if new_text:
        on_output(new_text)
    return text
