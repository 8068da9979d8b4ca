"""Storages: a folder and a bucket answer alike."""

import pytest

from hm_reco.lake.storage import Lake, open_lake, write_file


@pytest.fixture(params=["folder", "bucket"])
def lake(request: pytest.FixtureRequest, tmp_path) -> Lake:
    root = str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3")
    return open_lake(f"{root}/storage")


def test_read_files_returns_files_directly_in_folder(lake):
    for name in ("a.json", "b.txt", "nested/a.json"):
        write_file(lake.path("runs", "current", name), name)
    write_file(lake.path("runs", "current-old", "c.json"), "another folder")
    files = lake.storage.read_files(lake.uri("runs/current"))
    assert files == {"a.json": b"a.json", "b.txt": b"b.txt"}
    assert lake.storage.read_files(lake.uri("runs/missing")) == {}


def test_iter_files_lists_files_below_folder(lake):
    for name in ("in/a.csv", "in/nested/b.csv", "in-old/c.csv"):
        write_file(lake.path(name), name)
    found = {file.name: file.open().read() for file in lake.storage.iter_files(lake.uri("in"))}
    assert found == {"a.csv": b"in/a.csv", "nested/b.csv": b"in/nested/b.csv"}
