"""Commands as jobs of a Ray cluster, with the resources they ask for; their output is followed.

Ray's job server starts a command on a machine that has the CPUs, the memory and the GPUs which it
asks for, keeps its output, and goes on when the connection is lost. Nothing is sent but the
command: the machines have the code (the project's image, or the same checkout) and credentials of
their own, and reach the lake by its name.
https://docs.ray.io/en/latest/cluster/running-applications/job-submission/index.html
"""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from hm_reco.lake.runs import LINK
from hm_reco.lake.settings import Settings

PORT = 8265  # of the dashboard, where the job server is
LOOK = 0.5  # seconds between two looks at a job


class BackendError(RuntimeError):
    """The cluster that stages shall run on is not there, or cannot be reached."""


def dashboard_of(settings: Settings) -> str:
    """Where the dashboard of the cluster is: as the settings say, or at Ray's usual port."""
    if settings.dashboard:
        return settings.dashboard.rstrip("/")
    host = settings.cluster.removeprefix("ray://").rpartition(":")[0] or "127.0.0.1"
    return f"http://{host}:{PORT}"


@dataclass(frozen=True)
class Needs:
    """What a command needs of the machine it runs on."""

    cpus: float = 1
    memory: str = "8Gi"
    gpu: int = 0

    def as_options(self) -> dict[str, Any]:
        """In Ray's words, memory in bytes."""
        units = {"Mi": 2**20, "Gi": 2**30}
        memory = int(self.memory[:-2]) * units[self.memory[-2:]]
        return {
            "entrypoint_num_cpus": self.cpus,
            "entrypoint_memory": memory,
            "entrypoint_num_gpus": self.gpu,
        }


def job_client(dashboard: str) -> Any:
    """The job server at `dashboard`. Raises `BackendError` when there is none."""
    try:
        from ray.job_submission import JobSubmissionClient
    except ModuleNotFoundError as err:
        raise BackendError("Ray is not installed: hm-reco[cluster]") from err
    try:
        return JobSubmissionClient(dashboard)
    except (ConnectionError, RuntimeError) as err:
        raise BackendError(
            f"no Ray dashboard at {dashboard}, which takes jobs; HM_DASHBOARD says where it is"
        ) from err


def follow_job(
    client: Any,
    name: str,
    words: Sequence[str],
    needs: Needs,
    hear: Callable[[str], object] = print,
    wanted: Callable[[], bool] = lambda: True,
) -> tuple[str, str]:
    """Run a command as a job: how it ended (SUCCEEDED, FAILED, STOPPED), and what Ray says of it.

    The command finds the cluster in `HM_CLUSTER` and its page in the dashboard in `HM_JOB`.
    """
    job, heard = f"{name}-{uuid4().hex[:6]}", ""
    own = ("HM_CLUSTER=auto", f"{LINK}={client.get_address()}/#/jobs/{job}")
    entrypoint = shlex.join(["env", *own, *words])
    client.submit_job(entrypoint=entrypoint, submission_id=job, **needs.as_options())
    while not (status := client.get_job_status(job)).is_terminal():
        if not wanted():
            client.stop_job(job)
            if status.value == "PENDING":  # it will not be run, but Ray keeps it in its queue
                return "STOPPED", _message(client, job)
        # as long as it waits, Ray says for what
        heard = _tell(heard, _logs(client, job) or _message(client, job), hear)
        time.sleep(LOOK)
    _tell(heard, _logs(client, job), hear)
    return str(status.value), _message(client, job)


def _logs(client: Any, job: str) -> str:
    return str(client.get_job_logs(job))


def _message(client: Any, job: str) -> str:
    return client.get_job_info(job).message or ""


def _tell(heard: str, text: str, hear: Callable[[str], object]) -> str:
    """Hand on what was not heard yet."""
    more = text.removeprefix(heard)
    if more:
        hear(more)
    return text
