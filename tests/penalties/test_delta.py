"""Delta checkpoints: exact to the bit for every dtype, in the smallest encoding, with one sentence for each mistake."""

import json
import zlib

import keras
import ml_dtypes
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.files.arrays import load_arrays, save_arrays
from l2sp_tf.penalties import delta
from l2sp_tf.penalties.attachment import check_bound
from l2sp_tf.penalties.delta import FORMAT

UNSIGNED = {"float32": "u4", "float16": "u2", "bfloat16": "u2", "float64": "u8"}


def bits_of(array):
    array = np.asarray(array)
    return np.frombuffer(array.tobytes(), f"u{array.dtype.itemsize}").reshape(array.shape)


def model_of(dtype="float32", channels=40, name="m"):
    inputs = keras.Input((30,), dtype=dtype)
    x = keras.layers.Dense(channels, dtype=dtype, name="a")(inputs)
    x = keras.layers.Dense(channels, dtype=dtype, name="b")(x)
    return keras.Model(inputs, keras.layers.Dense(3, dtype=dtype, name="head")(x), name=name)


def set_bits(model, key, change):
    """Changes the bits of one weight."""
    layer, name = key.split("/")
    variable = getattr(model.get_layer(layer), name)
    bits = bits_of(variable.numpy()).copy()
    change(bits)
    variable.assign(bits.view(variable.numpy().dtype))


def round_trip(model, anchors, path, fresh):
    size = l2sp.save_delta(model, anchors, path)
    assert size.bytes == path.stat().st_size
    assert size.full_bytes == sum(weight.numpy().nbytes for weight in model.weights)
    l2sp.load_delta(fresh, anchors, path)
    for before, after in zip(model.weights, fresh.weights, strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(bits_of(before.numpy()), bits_of(after.numpy()), err_msg=before.path)
    return size


@pytest.mark.parametrize("dtype", list(UNSIGNED))
@pytest.mark.parametrize("share", ["none", "one", "channel", "all", "random"])
def test_the_round_trip_is_exact_to_the_bit(dtype, share, tmp_path):
    model = model_of(dtype)
    anchors = l2sp.Anchors.of(model)
    rng = np.random.default_rng(0)

    def change(bits):
        if share == "one":
            bits[3, 4] ^= 1
        elif share == "channel":
            bits[:, 5] += 7
        elif share == "all":  # every number one bit up or down, with wrap-around at 0
            bits += rng.integers(0, 2, bits.shape).astype(bits.dtype) * bits.dtype.type(2) - bits.dtype.type(1)
        elif share == "random":  # any pattern: NaN payloads, infinities, -0.0, subnormals
            bits[...] = np.frombuffer(rng.bytes(bits.nbytes), bits.dtype).reshape(bits.shape)

    if share != "none":
        set_bits(model, "b/kernel", change)
    size = round_trip(model, anchors, tmp_path / "d.safetensors", model_of(dtype))
    kind = {"none": "equal", "random": "whole"}.get(share, "changed")
    assert size.encodings == ({"equal": 6} if share == "none" else {"equal": 5, kind: 1})


@pytest.mark.parametrize("dtype", list(UNSIGNED))
def test_special_numbers_survive(dtype):
    exponent, mantissa = {"float32": (8, 23), "float16": (5, 10), "bfloat16": (8, 7), "float64": (11, 52)}[dtype]
    infinity, sign = ((1 << exponent) - 1) << mantissa, 1 << (exponent + mantissa)
    special = [0, sign, infinity, infinity | sign, infinity | 1, infinity | (1 << (mantissa - 1)) | 5, 1, sign | 1]
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    a = np.array(special, UNSIGNED[dtype]).view(kind).reshape(2, 4)
    b = np.roll(a.reshape(-1), 3).reshape(2, 4)
    bits, base = delta._bits(a), delta._bits(b)
    np.testing.assert_array_equal(delta._unpacked(delta._packed(bits, base), base), bits)
    for array, anchor in [(a, b), (a[1, 2], b[1, 2]), (a[:0], b[:0]), (a, a)]:
        array, anchor = np.asarray(array), np.asarray(anchor)
        encoding, part = delta._encoded(array, anchor)
        found = delta._decoded({"name": "w", "anchor": "v", "encoding": encoding}, {"w": part}, {"v": anchor})
        assert found.dtype == kind and found.shape == array.shape
        np.testing.assert_array_equal(bits_of(found), bits_of(array))


def test_differences_are_folded_and_packed_as_by_a_loop():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**16, 200, dtype="u2")
    bits = np.where(rng.random(200) < 0.5, base, rng.integers(0, 2**16, 200, dtype="u2")).astype("u2")
    marks, low, high = bytearray(25), b"", b""
    for i, (a, b) in enumerate(zip(bits.tolist(), base.tolist(), strict=True)):
        if a == b:
            continue
        marks[i // 8] |= 128 >> (i % 8)
        d = (a - b + 2**15) % 2**16 - 2**15  # the signed difference modulo 2^16
        folded = 2 * d if d >= 0 else -2 * d - 1
        low, high = low + bytes([folded % 256]), high + bytes([folded // 256])
    packed = delta._packed(bits, base)
    assert zlib.decompress(packed.tobytes()) == bytes(marks) + low + high
    np.testing.assert_array_equal(delta._unpacked(packed, base), bits)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 1.0])
def test_a_file_is_smaller_than_places_and_values_would_be(share):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(256, 256)).astype("float32")
    array = np.where(rng.random(base.shape) < share, base + np.float32(0.001), base)
    encoding, part = delta._encoded(array, base)
    assert encoding == "changed" and part.nbytes < min(8 * (array != base).sum(), 0.8 * array.nbytes)


def test_a_new_head_is_whole_and_the_rest_of_a_frozen_model_is_free(small_network, tmp_path):
    pretrained = small_network()
    anchors = l2sp.Anchors.of(pretrained)
    model = l2sp.with_new_head(pretrained, 7, seed=1)
    size = round_trip(model, anchors, tmp_path / "d.safetensors", l2sp.with_new_head(pretrained, 7, seed=2))
    assert size.encodings == {"equal": 8, "whole": 2}
    stored, _ = load_arrays(tmp_path / "d.safetensors", FORMAT, "not a delta", "save_delta")
    assert set(stored) == {"new_head/kernel", "new_head/bias"}
    np.testing.assert_array_equal(stored["new_head/kernel"], model.get_layer("new_head").kernel)
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


def test_of_a_nested_backbone_and_a_model_that_stays_attached(small_network, tmp_path):
    def nested():
        model = keras.Sequential([small_network(), keras.layers.Dense(2, name="top")])
        model.build((None, 6, 6, 3))
        return model

    anchors = l2sp.Anchors.of(small_network())
    model = nested()
    anchors.restore(model.layers[0])
    coverage = l2sp.attach(model, l2sp.L2SP(0.1), anchors)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign_add(rng.normal(size=weight.shape) / 100)
    other = nested()
    l2sp.attach(other, l2sp.L2SP(0.1), anchors)
    round_trip(model, anchors, tmp_path / "d.safetensors", other)
    check_bound(other, coverage)


def test_other_anchors_and_other_models_are_refused_and_nothing_changes(small_network, tmp_path):
    model, path = small_network(), tmp_path / "d.safetensors"
    anchors = l2sp.Anchors.of(model)
    l2sp.save_delta(model, anchors, path)
    others = l2sp.Anchors({**anchors, "conv1_conv/bias": np.ones(4, "float32")})
    with pytest.raises(l2sp.InputError, match=rf"digest {anchors.digest[:12]}, but these have {others.digest[:12]}"):
        l2sp.load_delta(model, others, path)
    wide = small_network(classes=5)
    before = l2sp.Anchors.of(wide).digest
    with pytest.raises(l2sp.InputError, match=r"predictions/kernel \(5, 5\) / \(5, 3\)"):
        l2sp.load_delta(wide, anchors, path)
    assert l2sp.Anchors.of(wide).digest == before
    half = model_of("float16")
    floats = model_of()
    anchors = l2sp.Anchors.of(floats)
    l2sp.save_delta(floats, anchors, path)
    with pytest.raises(l2sp.InputError, match=r"a/kernel is of float16 in the model 'm', but of float32"):
        l2sp.load_delta(half, anchors, path)
    with pytest.raises(l2sp.InputError, match="No weight of the model 'm' has an anchor"):
        l2sp.save_delta(half, anchors, path)


def test_a_damaged_file_is_refused_in_a_sentence(tmp_path):
    model, path = model_of(), tmp_path / "d.safetensors"
    anchors = l2sp.Anchors.of(model)
    set_bits(model, "a/kernel", lambda bits: bits.__iadd__(np.uint32(3)))
    set_bits(model, "b/kernel", lambda bits: bits.__setitem__((0, 0), 1))
    l2sp.save_delta(model, anchors, path)
    whole, other = path.read_bytes(), model_of()
    rng = np.random.default_rng(0)
    for position in [0, 9, len(whole) - 1, *rng.integers(len(whole), size=60)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(l2sp.InputError, match="damaged|not a delta|does not list|differs from anchors"):
            l2sp.load_delta(other, anchors, path)
    anchors.save(path)
    with pytest.raises(l2sp.InputError, match="is not a delta"):
        l2sp.load_delta(model, anchors, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.update(encoding="other"), "encoding 'other'"),
        (lambda e: e.update(anchor="missing"), "missing"),
        (lambda e: e.update(name="missing"), "missing"),
        (lambda e: e.pop("encoding"), "encoding"),
        (lambda e: e.update(anchor="b/kernel"), "damaged"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(change, words, tmp_path):
    model, path = model_of(), tmp_path / "d.safetensors"
    anchors = l2sp.Anchors.of(model)
    set_bits(model, "a/kernel", lambda bits: bits.__iadd__(np.uint32(3)))
    l2sp.save_delta(model, anchors, path)
    stored, metadata = load_arrays(path, FORMAT, "not a delta", "save_delta")
    entries = json.loads(metadata["weights"])
    change(entries[0])
    save_arrays(path, stored, FORMAT, {**metadata, "weights": json.dumps(entries)})
    with pytest.raises(l2sp.InputError, match=words):
        l2sp.load_delta(model, anchors, path)


def test_unpacking_takes_no_more_memory_than_the_weight():
    base = np.zeros(10, "u4")
    bomb = np.frombuffer(zlib.compress(b"\xff" * 10**7), "u1")
    assert delta._unpacked(bomb, base).nbytes == 40  # `load_delta` then rejects the digest
    with pytest.raises(ValueError):
        delta._unpacked(np.frombuffer(zlib.compress(b"\xff\xff" + bytes(20)), "u1"), base)
