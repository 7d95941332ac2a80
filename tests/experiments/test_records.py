"""Records: written atomically, checked when read."""

import json

import pytest

import l2sp_tf as l2sp
from l2sp_tf.experiments import records
from l2sp_tf.files.provenance import RESULTS_VERSION, provenance


def record(penalty="l2", seed=0, accuracy=0.5, alpha=0.1, source=None, **settings):
    results = {"accuracy": accuracy, "correct": round(200 * accuracy), "total": 200}
    if source is not None:
        before, after = ({"accuracy": a, "correct": round(100 * a), "total": 100} for a in source)
        results["source"] = {"before": before, "target_statistics": after, "source_statistics": after}
    return {
        "format": records.FORMAT,
        "settings": {
            "source": "s",
            "target": "t",
            "penalty": penalty,
            "alpha": alpha,
            "beta": 0.01,
            "seed": seed,
            "code": RESULTS_VERSION,
        }
        | settings,
        "coverage": {"digest": "c"},
        "anchors": {"digest": "a"},
        "results": results,
        **provenance(),
    }


def test_write_and_read(tmp_path):
    made = record()
    records.write_record(tmp_path / "runs/x/run.json", made)
    assert records.read_records(tmp_path) == [made]


def test_records_are_found_in_order_and_damaged_ones_left_out(tmp_path):
    for name in "ab":
        records.write_record(tmp_path / f"runs/{name}/run.json", record(seed=ord(name)))
    (tmp_path / "runs/c").mkdir()
    (tmp_path / "runs/c/run.json").write_text("{")
    with pytest.warns(UserWarning, match=r"c/run.json is not a record"):
        assert [r["settings"]["seed"] for r in records.read_records(tmp_path)] == [97, 98]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "other"),
        (("results",), []),
        (("results", "accuracy"), "0.5"),
        (("results", "accuracy"), float("nan")),
        (("results", "total"), True),
        (("settings", "seed"), None),
        (("settings", "penalty"), 3),
        (("settings", "anchors"), ["c"]),
        (("fisher",), "d"),
        (("fisher",), {"transforms": ["fisher"]}),
        (("fisher",), {"transforms": {"name": "fisher"}}),
        (("fisher",), {"transforms": [{"name": "fisher"}]}),
    ],
)
def test_a_wrong_field_is_named(tmp_path, path, value):
    data = {"format": records.FORMAT, **record()}
    target = data
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(l2sp.InputError, match=f"{path[-1]}|NaN is not allowed"):
        records.read_record(tmp_path / "run.json")


def test_a_bad_record_is_not_written(tmp_path):
    with pytest.raises(l2sp.InputError, match="results.accuracy"):
        records.write_record(tmp_path / "run.json", {**record(), "results": {"accuracy": float("inf")}})
    assert list(tmp_path.iterdir()) == []


def test_hostile_text_is_refused(tmp_path):
    for text in (b"\xff\xfe", b"[" * 100_000, b"null", b'{"format": "l2sp_tf.run.v1"}'):
        (tmp_path / "run.json").write_bytes(text)
        with pytest.raises(l2sp.InputError):
            records.read_record(tmp_path / "run.json")


def test_missing_folders_say_what_to_do(tmp_path):
    with pytest.raises(l2sp.InputError, match="There is no folder"):
        records.read_records(tmp_path / "none")
    with pytest.raises(l2sp.InputError, match="run train.py"):
        records.read_records(tmp_path)


def test_keys_follow_the_settings_and_not_their_order():
    assert records.run_key({"a": 1, "b": 2}) == records.run_key({"b": 2, "a": 1})
    assert records.run_key({"a": 1}) != records.run_key({"a": 2})
