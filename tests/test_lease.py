"""Leases on S3: acquired, renewed, acquired after expiry, and lost."""

import json
import os
import threading
import time

import pytest

import hm_reco.lake.lease as lease_module
from hm_reco.lake.lease import LEASE_FOLDER, LeaseError, ObjectLease, hold_leases
from hm_reco.lake.storage import open_lake, write_file
from tests.conftest import wait_until


@pytest.fixture
def lake(s3, request):
    return open_lake(f"{s3}/{request.node.name}")


def test_lease_held_makes_next_holder_wait(lake):
    events: list[str] = []
    with hold_leases(lake, ["training", "eda"]):
        with (
            pytest.raises(
                LeaseError, match=f"'eda' of this lake is in use by process {os.getpid()}"
            ),
            hold_leases(lake, ["eda"], timeout_seconds=0),
        ):
            pass
        waiter = threading.Thread(target=lambda: hold_lease(lake, events))
        waiter.start()
        wait_until(lambda: bool(events))
        time.sleep(0.5)
        assert events == ["waiting"]
    waiter.join(timeout=60)
    assert events == ["waiting", "held"]
    assert not list(lake.path(LEASE_FOLDER).glob("*.json"))


def hold_lease(lake, events):
    with hold_leases(lake, ["training"], notify=lambda _: events.append("waiting")):
        events.append("held")


def test_lease_concurrent_attempts_acquire_once(lake):
    contenders = [ObjectLease(lake, "training", lambda: None) for _ in range(8)]
    acquired: list[bool] = []
    threads = [
        threading.Thread(target=lambda contender=contender: acquired.append(contender.acquire()))
        for contender in contenders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(acquired) == [False] * 7 + [True]
    for lease in contenders:
        lease.release()


@pytest.mark.parametrize("host", ["another-machine", os.uname().nodename])
def test_lease_expired_is_acquired_by_next(lake, host, monkeypatch):
    stale_claim = {"host": host, "process": 2**22 + 1, "owner_id": "x", "renewal": "y"}
    write_file(lake.path(LEASE_FOLDER, "training.json"), json.dumps(stale_claim))
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 2.0)
    started = time.monotonic()
    with hold_leases(lake, ["training"], timeout_seconds=20, notify=lambda _: None):
        waited = time.monotonic() - started
    assert waited < 1 if host == os.uname().nodename else 2 < waited < 10


def test_lease_renewed_is_kept_and_loss_is_notified(lake, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 2.0)
    lost = threading.Event()
    lease = ObjectLease(lake, "training", lost.set)
    assert lease.acquire()
    with (
        pytest.raises(LeaseError),
        hold_leases(lake, ["training"], timeout_seconds=4, notify=lambda _: None),
    ):
        pass
    assert not lost.is_set()
    write_file(
        lake.path(LEASE_FOLDER, "training.json"),
        json.dumps({"host": "other", "owner_id": "other-owner"}),
    )
    assert lost.wait(10)
    lease.release()
    assert lake.path(LEASE_FOLDER, "training.json").exists()  # not ours, so not removed
