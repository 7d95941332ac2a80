"""Anchors: copies, keyed by layer and weight, verified when read."""

import json

import keras
import ml_dtypes
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.files.arrays import load_arrays, save_arrays
from l2sp_tf.penalties.matching import match
from l2sp_tf.penalties.weights import keyed_weights


def test_anchors_are_a_copy_by_value(small_network):
    model = small_network()
    anchors = l2sp.Anchors.of(model)
    before = {key: weight.variable.numpy().copy() for key, weight in keyed_weights(model).items()}
    for weight in model.weights:
        weight.assign(weight + 1)
    for key, value in before.items():
        np.testing.assert_array_equal(anchors[key], value)
    with pytest.raises(ValueError, match="read-only"):
        anchors["conv1_conv/kernel"][:] = 0


def test_keys_name_layer_and_weight(small_network):
    keys = list(l2sp.Anchors.of(small_network()))
    assert keys[:2] == ["conv1_conv/kernel", "conv1_conv/bias"]
    assert "conv1_bn/moving_variance" in keys
    assert keys[-1] == "predictions/bias"


def test_keys_do_not_depend_on_the_kind_of_model(small_network):
    base = small_network()
    sequential = keras.Sequential([base, keras.layers.Dense(2, name="top")], name="whatever")
    sequential.build((None, 6, 6, 3))
    keys = list(keyed_weights(sequential))
    assert "small/conv1_conv/kernel" in keys
    assert "top/kernel" in keys
    assert match(keyed_weights(sequential), keyed_weights(base)).pairs["small/conv1_conv/kernel"] == "conv1_conv/kernel"
    assert match(keyed_weights(base), keyed_weights(sequential)).pairs["conv1_conv/kernel"] == "small/conv1_conv/kernel"


def test_shared_layers_and_equal_names():
    shared = keras.layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, shared(shared(inputs)))
    assert list(keyed_weights(model)) == ["shared/kernel", "shared/bias"]

    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = keras.layers.Dense(4, name="twin"), keras.layers.Dense(4, name="twin")

        def call(self, x):
            return self.b(self.a(x))

    twins = Twins()
    twins(np.zeros((1, 4)))
    assert list(keyed_weights(twins)) == ["twin/kernel", "twin/bias", "twin/kernel#2", "twin/bias#2"]


def test_weights_without_a_name_are_called_by_their_attribute():
    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.gamma = self.add_weight(shape=shape[-1:])
            self.pair = [self.add_weight(shape=()), self.add_weight(shape=())]

        def call(self, x):
            return x * self.gamma + self.pair[0] * self.pair[1]

    for _ in range(2):  # Keras numbers such weights through the process
        model = keras.Sequential([keras.Input((3,)), Scale(name="scale")])
        assert list(keyed_weights(model)) == ["scale/gamma", "scale/variable", "scale/variable#2"]


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="has no weights"):
        l2sp.Anchors.of(keras.Sequential([keras.layers.Dense(3)]))


def test_save_and_load_are_exact(small_network, tmp_path):
    anchors = l2sp.Anchors.of(small_network())
    anchors.save(tmp_path / "anchors.safetensors")
    loaded = l2sp.Anchors.load(tmp_path / "anchors.safetensors")
    assert loaded.digest == anchors.digest
    assert list(loaded) == list(anchors) or set(loaded) == set(anchors)
    for key in anchors:
        np.testing.assert_array_equal(loaded[key], anchors[key])
    assert [path.name for path in tmp_path.iterdir()] == ["anchors.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, "float64", "int8", "bool"])
def test_every_dtype_survives(dtype, tmp_path):
    anchors = l2sp.Anchors({"a/kernel": np.ones((2, 3)).astype(dtype), "s": np.array(1).astype(dtype)})
    anchors.save(tmp_path / "a.safetensors")
    loaded = l2sp.Anchors.load(tmp_path / "a.safetensors")
    assert loaded.digest == anchors.digest
    assert loaded["a/kernel"].dtype == np.dtype(dtype)


def test_the_digest_changes_with_every_difference():
    base = {"a": np.zeros((2, 3), "float32"), "b": np.zeros(2, "float32")}
    digest = l2sp.Anchors(base).digest
    assert l2sp.Anchors(dict(reversed(base.items()))).digest == digest
    changed = [
        {**base, "a": np.full((2, 3), 1e-30, "float32")},
        {**base, "a": np.zeros((3, 2), "float32")},
        {**base, "a": np.zeros((2, 3), "int32")},
        {"c": base["a"], "b": base["b"]},
    ]
    assert len({digest, *(l2sp.Anchors(c).digest for c in changed)}) == 5


def test_a_damaged_file_is_refused_in_a_sentence(small_network, tmp_path):
    path = tmp_path / "anchors.safetensors"
    l2sp.Anchors.of(small_network()).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in [0, 9, len(whole) - 1, *rng.integers(len(whole), size=60)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(l2sp.InputError, match="damaged|not a file of anchors|does not list"):
            l2sp.Anchors.load(path)
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(l2sp.InputError, match="damaged"):
            l2sp.Anchors.load(path)
    with pytest.raises(l2sp.InputError, match="There is no file"):
        l2sp.Anchors.load(tmp_path / "missing.safetensors")


def test_arrays_of_another_kind_are_not_anchors(tmp_path):
    save_arrays(tmp_path / "x", {"a": np.zeros(3)}, "another", {"of": "its own"})
    with pytest.raises(l2sp.InputError, match="not a file of anchors"):
        l2sp.Anchors.load(tmp_path / "x")
    assert json.loads(json.dumps(load_arrays(tmp_path / "x", "another", "not another", "it")[1])) == {"of": "its own"}


def test_restore_gives_the_pretrained_model_back(small_network):
    model = small_network()
    anchors = l2sp.Anchors.of(model)
    other = small_network(name="other")
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3))
    assert not np.allclose(model(x), other(x))
    anchors.restore(other)
    np.testing.assert_array_equal(model(x), other(x))


def test_restore_into_another_architecture_lists_both_sides_and_changes_nothing(small_network):
    model = small_network(classes=4)
    before = l2sp.Anchors.of(model)
    with pytest.raises(l2sp.InputError, match=r"predictions/kernel \(5, 4\) / \(5, 3\)"):
        l2sp.Anchors.of(small_network()).restore(model)
    assert l2sp.Anchors.of(model).digest == before.digest
