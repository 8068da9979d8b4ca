"""Leases on S3: taken, renewed, taken over from the dead, and lost."""

import json
import os
import threading
import time

import pytest

import hm_reco.lake.lease as module
from hm_reco.lake.lease import LEASE_FOLDER, LeaseError, S3Lease, hold_leases
from hm_reco.lake.storage import open_lake, write_file
from tests.conftest import until


@pytest.fixture
def lake(s3, request):
    return open_lake(f"{s3}/{request.node.name}")


def test_one_holds_it_and_the_other_waits(lake):
    said: list[str] = []
    with hold_leases(lake, ["training", "eda"]):
        with (
            pytest.raises(
                LeaseError, match=f"'eda' of this lake is in use by process {os.getpid()}"
            ),
            hold_leases(lake, ["eda"], timeout_seconds=0),
        ):
            pass
        later = threading.Thread(target=lambda: _hold(lake, said))
        later.start()
        until(lambda: bool(said))
        time.sleep(0.5)
        assert said == ["told"]
    later.join(timeout=60)
    assert said == ["told", "held"]
    assert not list(lake.path(LEASE_FOLDER).glob("*.json"))


def _hold(lake, said):
    with hold_leases(lake, ["training"], notify=lambda _: said.append("told")):
        said.append("held")


def test_of_many_who_try_at_once_one_gets_it(lake):
    tries = [S3Lease(lake, "training", lambda: None) for _ in range(8)]
    got: list[bool] = []
    threads = [threading.Thread(target=lambda t=t: got.append(t.acquire())) for t in tries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]
    for lease in tries:
        lease.release()


@pytest.mark.parametrize("host", ["another-machine", os.uname().nodename])
def test_what_nobody_renews_is_taken_over(lake, host, monkeypatch):
    dead = {"host": host, "process": 2**22 + 1, "owner_id": "x", "renewal": "y"}
    write_file(lake.path(LEASE_FOLDER, "training.json"), json.dumps(dead))
    monkeypatch.setattr(module, "STALE_SECONDS", 2.0)
    start = time.monotonic()
    with hold_leases(lake, ["training"], timeout_seconds=20, notify=lambda _: None):
        waited = time.monotonic() - start
    assert waited < 1 if host == os.uname().nodename else 2 < waited < 10


def test_who_renews_keeps_it_and_who_lost_it_is_told(lake, monkeypatch):
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(module, "STALE_SECONDS", 2.0)
    lost = threading.Event()
    lease = S3Lease(lake, "training", lost.set)
    assert lease.acquire()
    with (
        pytest.raises(LeaseError),
        hold_leases(lake, ["training"], timeout_seconds=4, notify=lambda _: None),
    ):
        pass
    assert not lost.is_set()
    write_file(
        lake.path(LEASE_FOLDER, "training.json"),
        json.dumps({"host": "other", "owner_id": "theirs"}),
    )
    assert lost.wait(10)
    lease.release()
    assert lake.path(LEASE_FOLDER, "training.json").exists()  # not ours, so not removed
