"""A model or a state whose makers vouch for nonsense is refused before compiled code follows it."""

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
from hm_reco.ranking.features import build_training_matrix, build_week
from hm_reco.ranking.forest import build_forest, check_trees, predict_scores
from hm_reco.ranking.ranker import RANKER, RankerSettings, train
from hm_reco.registry.bundle import MANIFEST, Bundle, BundleError, load_bundle, save_bundle
from hm_reco.retrieval.embeddings import EmbeddingSpace, read_encoder
from hm_reco.retrieval.two_tower import (
    TwoTower,
    TwoTowerSettings,
    build_vocabulary,
    from_bytes,
    to_bytes,
)
from hm_reco.serving.recommend import build_recommender, predict_all, recommend, with_precomputed
from hm_reco.serving.snapshot import (
    ARRAYS_FILE,
    LAYOUT,
    SNAPSHOTS_FOLDER,
    SnapshotError,
    load_snapshot,
    map_arrays,
    save_snapshot,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """A lake with a bundle and its state."""
    history = generate_history(400)
    week = build_week(history, history.day - timedelta(days=28), days=28)
    booster = train([build_training_matrix(week)], RankerSettings(rounds=10, min_data_in_leaf=20))
    bundle = Bundle("v1", RANKER, history.day, booster, {}, {})
    lake = open_lake(str(tmp_path_factory.mktemp("hostile") / "lake"))
    recommender = build_recommender(history, bundle)
    save_bundle(lake, bundle)
    name = save_snapshot(lake, with_precomputed(recommender, predict_all(recommender)), {})
    return lake, bundle, name


def test_an_honest_model_is_taken(made):
    lake, bundle, name = made
    check_trees(bundle.booster.model_to_string())
    assert recommend(load_snapshot(lake, load_bundle(lake, "v1"), name), [""])[""].articles


@pytest.mark.parametrize(
    ("pattern", "instead", "told"),
    [
        (r"split_feature=\d+", "split_feature=9999", "a feature beyond"),
        (r"left_child=-?\d+", "left_child=0", "its nodes are no tree"),
        (r"right_child=\S+ ", "right_child=", "columns of another length"),
        (r"num_leaves=\d+", "num_leaves=2000000000", "leaves; 1 to 64"),
        (r"leaf_value=\S+ ", "leaf_value=", "leaf values"),
        (r"tree_sizes=\d", "tree_sizes=9", "does not begin where it should"),
        (r"max_feature_idx=\d+", "max_feature_idx=5", "6 features"),
        (r"decision_type=\d+", "decision_type=1", "other than by a threshold"),
        (r"num_class=1", "num_class=100", "classes and trees"),
        (r"tree_sizes=", "tree_seizes=", "no 'tree_sizes'"),
        (r"threshold=(\S+)", "threshold=\\1 ü", "columns of another length"),
    ],
)
def test_trees_that_lead_astray_are_refused(made, tmp_path, pattern, instead, told):
    text = made[1].booster.model_to_string()
    bad = re.sub(pattern, instead, text, count=1)
    if "tree_s" not in pattern and "\nTree=" in text.split(re.search(pattern, text)[0])[0]:
        first = int(re.search(r"tree_sizes=(\d+)", bad)[1]) + len(bad) - len(text)
        bad = re.sub(r"tree_sizes=\d+", f"tree_sizes={first}", bad, count=1)
    lake = open_lake(str(tmp_path))
    save_bundle(lake, made[1])
    vouch(lake, "ranker.txt", bad.encode())
    with pytest.raises(BundleError, match=told):
        load_bundle(lake, "v1")


def vouch(lake: Lake, name: str, content: bytes) -> None:
    """Another file in a bundle, with its checksum."""
    folder = lake.path("artifacts", "models", "v1")
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_numbers_changed_by_lot_never_end_the_process(made):
    """Refused by the check or by LightGBM, or a model like any other."""
    text, draw, refused = made[1].booster.model_to_string(), random.Random(0), 0
    places = list(re.finditer(r"(?<==)-?\d+|(?<= )-?\d+", text[: text.index("end of trees")]))
    values = np.random.default_rng(0).random((70, made[1].booster.num_feature()), np.float32)
    for _ in range(300):
        place = draw.choice(places)
        number = str(draw.choice([-1, 0, 7, 64, 10**6, -(10**6)]))
        other = number[: len(place[0])].rjust(len(place[0]), "0")  # every tree stays where it was
        bad = text[: place.start()] + other + text[place.end() :]
        try:
            check_trees(bad)
            forest = build_forest(lgb.Booster(model_str=bad))
            assert predict_scores(forest, values).shape == (70,)
        except (ValueError, lgb.basic.LightGBMError):
            refused += 1
    assert refused > 30


def test_a_file_too_large_and_a_file_nobody_knows(made, tmp_path, monkeypatch):
    lake = open_lake(str(tmp_path))
    save_bundle(lake, made[1])
    monkeypatch.setitem(load_bundle.__globals__["MOST_BYTES"], "ranker.txt", 100)
    with pytest.raises(BundleError, match="100 are allowed"):
        load_bundle(lake, "v1")
    monkeypatch.undo()
    (lake.path("artifacts", "models", "v1") / "../v1/more.bin").write_bytes(b"x")
    vouch(lake, "more.bin", b"x")
    with pytest.raises(BundleError, match=r"'more\.bin' has 1 bytes; 0 are allowed"):
        load_bundle(lake, "v1")


def test_a_tower_larger_than_its_weights(made):
    history = generate_history(200)
    tower = TwoTower(build_vocabulary(history.articles), TwoTowerSettings(width=16))
    data = to_bytes(tower)
    assert from_bytes(data).settings.width == 16
    larger = data.replace(b'\\"width\\": 16', b'\\"width\\": 64')
    assert larger != data
    with pytest.raises(ValueError, match="weights of other sizes"):
        from_bytes(larger)
    with pytest.raises(ValueError, match=r"no tower: gap\.weight is \(12, 16\), not \(12, 64\)"):
        read_encoder(larger)


def test_a_tower_changed_by_lot_is_refused_or_a_tower(made):
    history = generate_history(200)
    data = to_bytes(TwoTower(build_vocabulary(history.articles), TwoTowerSettings(width=16)))
    draw, refused = random.Random(0), 0
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(3):
            bad[draw.randrange(8 + int.from_bytes(data[:8], "little"))] = draw.randrange(32, 127)
        try:
            assert read_encoder(bytes(bad)).output.shape == (32, 16)
        except ValueError:
            refused += 1
    assert refused > 100
    with pytest.raises(ValueError, match="the tower is 16 wide"):
        EmbeddingSpace(np.zeros((5, 64), np.int8), read_encoder(data))


def state_with(made, name: str, value: np.ndarray) -> None:
    """Load the state with another array, as if it had been saved so."""
    lake, bundle, state = made
    folder = lake.path(*SNAPSHOTS_FOLDER, "v1", state)
    kept = {file: (folder / file).read_bytes() for file in (ARRAYS_FILE, "snapshot.json")}
    arrays = {key: np.array(array) for key, array in map_arrays(folder / ARRAYS_FILE).items()}
    try:
        save_file(arrays | {name: value}, folder / ARRAYS_FILE)
        about = json.loads(kept["snapshot.json"])
        about["files"][ARRAYS_FILE] = hashlib.sha256(
            (folder / ARRAYS_FILE).read_bytes()
        ).hexdigest()
        (folder / "snapshot.json").write_text(json.dumps(about))
        load_snapshot(lake, bundle, state)
    finally:
        for file, content in kept.items():
            (folder / file).write_bytes(content)


def arrays_of(made) -> dict[str, np.ndarray]:
    return map_arrays(made[0].path(*SNAPSHOTS_FOLDER, "v1", made[2], ARRAYS_FILE))


def test_arrays_of_other_kinds_and_sizes_are_refused(made):
    arrays = arrays_of(made)
    assert LAYOUT.keys() <= arrays.keys()
    tables = [
        name for name in arrays if name.rsplit(".", 1)[1] in ("start", "indptr", "indices", "data")
    ]
    kinds = {np.dtype("f4"): "f8", np.dtype("f8"): "f4"}
    for name in [*LAYOUT, *tables]:
        value = np.array(arrays[name])
        with pytest.raises(SnapshotError):
            state_with(made, name, value.astype(kinds.get(value.dtype, "i2")))
        if value.size and name != "index.new_arrivals":  # of which there may be any number
            with pytest.raises(SnapshotError):
                state_with(made, name, value[1:].copy())


def test_numbers_beyond_are_refused(made):
    arrays, at_least = arrays_of(made), 0
    for name, array in arrays.items():
        if array.dtype.kind == "i" and array.size and name != "customers.customer":
            for value in (np.iinfo(array.dtype).max, np.iinfo(array.dtype).min):
                bad = np.array(array)
                bad.flat[bad.size // 2] = value
                try:
                    state_with(made, name, bad)
                except SnapshotError:
                    at_least += 1
    # ago, units, channel, vectors are no indices; all else is
    assert at_least > 2 * 28


def test_another_day_of_the_same_model_is_no_mix(made):
    lake, bundle, state = made
    with pytest.raises(SnapshotError, match="never completely written"):
        load_snapshot(lake, replace(bundle, version="v2"), state)
