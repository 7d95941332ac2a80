"""The Fisher diagonal as a result: its file, its sums, its transforms and its standard error."""

import hashlib

import numpy as np
import pytest
from fisher_models import assert_close, images, randomise, small, spatial
from keras import layers

from l2sp_tf.files.errors import InputError
from l2sp_tf.fisher.diagonal import Fisher
from l2sp_tf.fisher.estimator import fisher_diagonal
from l2sp_tf.penalties.anchors import Anchors


def test_save_and_load(tmp_path):
    model, x = small()
    f = fisher_diagonal(model, x, batch_size=3, source="twelve random vectors")
    f = f.clip(0.5).epsilon(1e-3).normalise()
    f.save(tmp_path / "f.safetensors")
    loaded = Fisher.load(tmp_path / "f.safetensors")
    assert loaded.digest == f.digest and loaded.provenance == f.provenance and loaded.standard_error() == f.standard_error()
    for key in f:
        np.testing.assert_array_equal(loaded[key], f[key])
        assert loaded[key].dtype == np.float32 and not loaded[key].flags.writeable
    assert f.provenance["model"] == Anchors.of(model).digest
    assert [t["name"] for t in f.provenance["transforms"]] == ["clip", "epsilon", "normalise"]


def test_a_damaged_file_is_refused(tmp_path):
    model, x = small()
    path = tmp_path / "f.safetensors"
    fisher_diagonal(model, x).save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        Fisher.load(path)
    data[-3] ^= 1
    path.write_bytes(bytes(data).replace(b'\\"images\\": 12', b'\\"images\\": 13'))
    with pytest.raises(InputError, match="damaged"):
        Fisher.load(path)
    Anchors.of(model).save(path)
    with pytest.raises(InputError, match="not a Fisher diagonal"):
        Fisher.load(path)


def test_plus_refuses_passes_that_do_not_belong_together():
    model, x = small()
    f = fisher_diagonal(model, x)
    with pytest.raises(InputError, match="mode differ"):
        f + fisher_diagonal(model, x, "exact")
    with pytest.raises(InputError, match="samples differ"):
        f + fisher_diagonal(model, x, samples=2)
    with pytest.raises(InputError, match="transformed"):
        f + f.epsilon(1.0)
    randomise(model, seed=5)
    with pytest.raises(InputError, match="model differ.*other weights"):
        f + fisher_diagonal(model, x)
    moved = {**f.provenance["weights"], "a/kernel": "0" * 64}
    with pytest.raises(InputError, match=r"at other weights \(of a/kernel, say\)"):
        f + Fisher(f, {**f.provenance, "weights": moved}, f._statistics)


def test_the_provenance_has_the_sha256_of_every_weight(tmp_path):
    model = randomise(spatial(layers.BatchNormalization(name="bn")))
    model.get_layer("stem").trainable = False
    f = fisher_diagonal(model, images(dtype="float32"))
    expected = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in Anchors.of(model).items()}
    assert f.provenance["weights"] == expected and {"stem/kernel", "bn/moving_mean"} <= set(expected)
    older = Fisher(f, {key: value for key, value in f.provenance.items() if key != "weights"}, f._statistics)
    older.save(tmp_path / "older.safetensors")
    loaded = Fisher.load(tmp_path / "older.safetensors")
    assert "weights" not in loaded.provenance and (loaded + f).provenance["weights"] == (f + f).provenance["weights"] == expected


def test_plus_weighs_by_images_and_keeps_the_spread():
    model, x = small()
    whole = fisher_diagonal(model, x, "exact", batch_size=2)
    parts = fisher_diagonal(model, x[:2], "exact", batch_size=2, source="a") + fisher_diagonal(
        model, x[2:], "exact", batch_size=2, first=2, source="b"
    )
    assert_close(parts, whole)
    assert parts.provenance["images"] == 12 and parts.provenance["source"] == ["a", "b"] and parts.provenance["first"] == [0, 2]
    assert parts.standard_error() == pytest.approx(whole.standard_error())


def test_transforms():
    model, x = small()
    f = fisher_diagonal(model, x)
    for key in f:
        np.testing.assert_array_equal(f.clip(0.01)[key], np.minimum(f[key], np.float32(0.01)))
        np.testing.assert_array_equal(f.epsilon(0.5)[key], f[key] + np.float32(0.5))
    entries = np.concatenate([array.ravel() for array in f.normalise().values()])
    assert entries.mean(dtype="float64") == pytest.approx(1)
    assert f.provenance["transforms"] == []
    for wrong in (0, -1, float("nan"), "1"):
        with pytest.raises(InputError):
            f.clip(wrong)


def test_standard_error_is_the_spread_over_batches():
    model, x = small()
    f = fisher_diagonal(model, x, "exact", batch_size=5)  # batches of 5, 5 and 2
    parts = [fisher_diagonal(model, part, "exact") for part in (x[:5], x[5:10], x[10:])]
    n = np.array([5, 5, 2])
    t = np.array([np.concatenate([part["a/kernel"].ravel(), part["a/bias"]]).mean() for part in parts])
    mean = n @ t / 12
    assert f.standard_error()["a"] == pytest.approx(np.sqrt(n @ (t - mean) ** 2 / 2 / 12) / mean, rel=1e-4)
    assert parts[0].standard_error() == {"a": float("inf"), "b": float("inf")}
