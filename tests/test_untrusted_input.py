"""Models and snapshots with valid checksums but invalid content are rejected on load."""

import hashlib
import json
import random
import re
from dataclasses import replace
from datetime import timedelta

import lightgbm as lgb
import numpy as np
import pytest
from safetensors.numpy import save_file

from hm_reco.data.history import generate_history
from hm_reco.lake.storage import Lake, open_lake
from hm_reco.ranking.forest import build_forest, check_trees, predict_scores
from hm_reco.ranking.ranker import RANKER, RankerSettings
from hm_reco.ranking.rankers import train
from hm_reco.ranking.weeks import build_training_matrix, build_week
from hm_reco.registry.bundle import MANIFEST, Bundle, BundleError, load_bundle, save_bundle
from hm_reco.retrieval.embeddings import EmbeddingSpace, read_encoder
from hm_reco.retrieval.two_tower import (
    TwoTower,
    TwoTowerSettings,
    build_vocabulary,
    from_bytes,
    to_bytes,
)
from hm_reco.serving.array_file import LAYOUT, SnapshotError, map_arrays
from hm_reco.serving.batch import predict_all, with_precomputed
from hm_reco.serving.recommend import recommend
from hm_reco.serving.recommender import build_recommender
from hm_reco.serving.snapshot import ARRAYS_FILE, SNAPSHOTS_FOLDER, load_snapshot, save_snapshot


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory):
    """A lake, a bundle in it and the name of its snapshot."""
    history = generate_history(400)
    week = build_week(history, history.day - timedelta(days=28), days=28)
    ranker = train([build_training_matrix(week)], RankerSettings(rounds=10, min_data_in_leaf=20))
    bundle = Bundle("v1", RANKER, history.day, ranker, {}, {})
    lake = open_lake(str(tmp_path_factory.mktemp("hostile") / "lake"))
    recommender = build_recommender(history, bundle)
    save_bundle(lake, bundle)
    name = save_snapshot(lake, with_precomputed(recommender, predict_all(recommender)), {})
    return lake, bundle, name


def test_valid_model_and_snapshot_are_loaded(saved_model):
    lake, bundle, name = saved_model
    check_trees(bundle.ranker.booster.model_to_string())
    assert recommend(load_snapshot(lake, load_bundle(lake, "v1"), name), [""])[""].articles


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"split_feature=\d+", "split_feature=9999", "a feature is not in"),
        (r"left_child=-?\d+", "left_child=0", "the nodes do not form a tree"),
        (r"right_child=\S+ ", "right_child=", "columns do not have"),
        (r"num_leaves=\d+", "num_leaves=2000000000", "leaves; 1 to 64"),
        (r"leaf_value=\S+ ", "leaf_value=", "`leaf_value` does not have"),
        (r"tree_sizes=\d", "tree_sizes=9", "does not begin at the offset"),
        (r"max_feature_idx=\d+", "max_feature_idx=5", "its 6 features"),
        (r"decision_type=\d+", "decision_type=1", "a decision is not by a threshold"),
        (r"num_class=1", "num_class=100", "num_class and num_tree"),
        (r"tree_sizes=", "tree_seizes=", "no 'tree_sizes'"),
        (r"threshold=(\S+)", "threshold=\\1 ü", "columns do not have"),
    ],
)
def test_bundle_with_invalid_trees_is_rejected(
    saved_model, tmp_path, pattern, replacement, message
):
    text = saved_model[1].ranker.booster.model_to_string()
    edited = re.sub(pattern, replacement, text, count=1)
    if "tree_s" not in pattern and "\nTree=" in text.split(re.search(pattern, text)[0])[0]:
        first_size = int(re.search(r"tree_sizes=(\d+)", edited)[1]) + len(edited) - len(text)
        edited = re.sub(r"tree_sizes=\d+", f"tree_sizes={first_size}", edited, count=1)
    lake = open_lake(str(tmp_path))
    save_bundle(lake, saved_model[1])
    write_with_checksum(lake, "ranker.model", edited.encode())
    with pytest.raises(BundleError, match=message):
        load_bundle(lake, "v1")


def write_with_checksum(lake: Lake, name: str, content: bytes) -> None:
    """Replace a file of a bundle and update its checksum."""
    folder = lake.path("artifacts", "models", "v1")
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_random_tree_edits_never_crash(saved_model):
    """Each edit is rejected by the check or by LightGBM, or gives a valid model."""
    text, rng, n_rejected = saved_model[1].ranker.booster.model_to_string(), random.Random(0), 0
    matches = list(re.finditer(r"(?<==)-?\d+|(?<= )-?\d+", text[: text.index("end of trees")]))
    values = np.random.default_rng(0).random(
        (70, saved_model[1].ranker.booster.num_feature()), np.float32
    )
    for _ in range(300):
        match = rng.choice(matches)
        number = str(rng.choice([-1, 0, 7, 64, 10**6, -(10**6)]))
        padded = number[: len(match[0])].rjust(len(match[0]), "0")  # the length stays the same
        edited = text[: match.start()] + padded + text[match.end() :]
        try:
            check_trees(edited)
            forest = build_forest(lgb.Booster(model_str=edited))
            assert predict_scores(forest, values).shape == (70,)
        except (ValueError, lgb.basic.LightGBMError):
            n_rejected += 1
    assert n_rejected > 30


def test_bundle_with_oversized_or_unknown_file_is_rejected(saved_model, tmp_path, monkeypatch):
    lake = open_lake(str(tmp_path))
    save_bundle(lake, saved_model[1])
    monkeypatch.setitem(load_bundle.__globals__["MAX_BYTES"], "ranker.model", 100)
    with pytest.raises(BundleError, match="100 are allowed"):
        load_bundle(lake, "v1")
    monkeypatch.undo()
    (lake.path("artifacts", "models", "v1") / "../v1/more.bin").write_bytes(b"x")
    write_with_checksum(lake, "more.bin", b"x")
    with pytest.raises(BundleError, match=r"'more\.bin' has 1 bytes; 0 are allowed"):
        load_bundle(lake, "v1")


def test_two_tower_larger_than_weights_is_rejected(saved_model):
    history = generate_history(200)
    two_tower = TwoTower(build_vocabulary(history.articles), TwoTowerSettings(width=16))
    data = to_bytes(two_tower)
    assert from_bytes(data).settings.width == 16
    larger = data.replace(b'\\"width\\": 16', b'\\"width\\": 64')
    assert larger != data
    with pytest.raises(ValueError, match="do not have the sizes"):
        from_bytes(larger)
    with pytest.raises(
        ValueError, match=r"not a two-tower model: gap\.weight is \(12, 16\), not \(12, 64\)"
    ):
        read_encoder(larger)


def test_random_two_tower_edits_are_rejected_or_valid(saved_model):
    history = generate_history(200)
    data = to_bytes(TwoTower(build_vocabulary(history.articles), TwoTowerSettings(width=16)))
    rng, n_rejected = random.Random(0), 0
    for _ in range(300):
        edited = bytearray(data)
        for _ in range(3):
            edited[rng.randrange(8 + int.from_bytes(data[:8], "little"))] = rng.randrange(32, 127)
        try:
            assert read_encoder(bytes(edited)).output.shape == (32, 16)
        except ValueError:
            n_rejected += 1
    assert n_rejected > 100
    with pytest.raises(ValueError, match="the encoder has width 16"):
        EmbeddingSpace(np.zeros((5, 64), np.int8), read_encoder(data))


def load_with_array(saved_model, name: str, value: np.ndarray) -> None:
    """Load the snapshot with one array replaced, and its checksum updated."""
    lake, bundle, snapshot = saved_model
    folder = lake.path(*SNAPSHOTS_FOLDER, "v1", snapshot)
    original_files = {file: (folder / file).read_bytes() for file in (ARRAYS_FILE, "snapshot.json")}
    arrays = {key: np.array(array) for key, array in map_arrays(folder / ARRAYS_FILE).items()}
    try:
        save_file(arrays | {name: value}, folder / ARRAYS_FILE)
        info = json.loads(original_files["snapshot.json"])
        info["files"][ARRAYS_FILE] = hashlib.sha256((folder / ARRAYS_FILE).read_bytes()).hexdigest()
        (folder / "snapshot.json").write_text(json.dumps(info))
        load_snapshot(lake, bundle, snapshot)
    finally:
        for file, content in original_files.items():
            (folder / file).write_bytes(content)


def read_arrays(saved_model) -> dict[str, np.ndarray]:
    return map_arrays(saved_model[0].path(*SNAPSHOTS_FOLDER, "v1", saved_model[2], ARRAYS_FILE))


def test_snapshot_arrays_of_wrong_type_or_size_are_rejected(saved_model):
    arrays = read_arrays(saved_model)
    assert LAYOUT.keys() <= arrays.keys()
    list_arrays = [
        name for name in arrays if name.rsplit(".", 1)[1] in ("start", "indptr", "indices", "data")
    ]
    other_types = {np.dtype("f4"): "f8", np.dtype("f8"): "f4"}
    for name in [*LAYOUT, *list_arrays]:
        value = np.array(arrays[name])
        with pytest.raises(SnapshotError):
            load_with_array(saved_model, name, value.astype(other_types.get(value.dtype, "i2")))
        if value.size and name != "index.tables.new_arrivals":  # of any length
            with pytest.raises(SnapshotError):
                load_with_array(saved_model, name, value[1:].copy())


def test_snapshot_indices_out_of_range_are_rejected(saved_model):
    arrays, n_rejected = read_arrays(saved_model), 0
    for name, array in arrays.items():
        if array.dtype.kind == "i" and array.size and name != "customers.customer":
            for value in (np.iinfo(array.dtype).max, np.iinfo(array.dtype).min):
                edited = np.array(array)
                edited.flat[edited.size // 2] = value
                try:
                    load_with_array(saved_model, name, edited)
                except SnapshotError:
                    n_rejected += 1
    # days_ago, units, channel and vectors are no indices; all other integers are
    assert n_rejected > 2 * 28


def test_snapshot_of_another_version_is_rejected(saved_model):
    lake, bundle, snapshot = saved_model
    with pytest.raises(SnapshotError, match="never completely written"):
        load_snapshot(lake, replace(bundle, version="v2"), snapshot)
