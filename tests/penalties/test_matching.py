"""Matching weights, for every network of keras.applications and every renaming: the true match or a reported doubt."""

import functools
import inspect
import itertools
import json
import random
import re
import time

import keras
import ml_dtypes
import numpy as np
import pytest
from networks import MAKERS

import l2sp_tf as l2sp
from l2sp_tf.evaluation.accuracy import transplant
from l2sp_tf.evaluation.report import distances, pretrained_of
from l2sp_tf.files.arrays import load_arrays
from l2sp_tf.models.copies import detached_copy
from l2sp_tf.models.keras_files import load_model
from l2sp_tf.penalties.delta import FORMAT
from l2sp_tf.penalties.matching import match
from l2sp_tf.penalties.weights import keyed_weights

# One small member of each family, then all others; two families have no member that builds quickly.
FAMILIES = ["ResNet50", "ResNet50V2", "MobileNet", "MobileNetV2", "MobileNetV3Small", "EfficientNetB0", "EfficientNetV2B0"]
FAMILIES += ["DenseNet121", "VGG16", "ConvNeXtTiny", "InceptionV3", "Xception"]
ALL = [name for name, value in vars(keras.applications).items() if inspect.isfunction(value)]
OTHERS = [name for name in ALL if name not in FAMILIES]
SHORT = ("ResNet", "EfficientNet", "ConvNeXt")  # members of fewer blocks than any in keras.applications
QUICK = (*SHORT, "MobileNetV2", "MobileNetV3Small", "InceptionV3", "Xception")
NETWORKS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES + OTHERS if name not in QUICK)]
SMALLEST = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}
OPTIONS = {"MobileNet": {"alpha": 0.25}, "MobileNetV2": {"alpha": 0.35}}
# Names that Keras numbers through the process.
AUTOMATIC = ("conv2d", "batch_normalization", "dense", "normalization", "separable_conv2d", "functional", "sequential")


def build(name):
    if name in SHORT:
        return MAKERS[name]()
    side = SMALLEST.get(name, 32)
    return getattr(keras.applications, name)(weights=None, classes=7, input_shape=(side, side, 3), **OPTIONS.get(name, {}))


@functools.cache
def shapes(name):
    """The keys and shapes of a network; sizes are mapped one-to-one to small ones."""
    found = {key: tuple(weight.variable.shape) for key, weight in keyed_weights(build(name)).items()}
    keras.backend.clear_session()
    sizes = sorted({size for shape in found.values() for size in shape if size > 7})
    small = {size: 8 + rank for rank, size in enumerate(sizes)}
    return {key: tuple(small.get(size, size) for size in shape) for key, shape in found.items()}


def tagged(shapes, seed=0, constant=False):
    """A distinct random array for each weight; with `constant`, vectors have Keras' initial values."""
    rng = np.random.default_rng(seed)
    return {
        key: np.full(shape, float("gamma" in key or "variance" in key), "float32")
        if constant and len(shape) < 2
        else rng.normal(0.0, 0.1, shape).astype("float32")
        for key, shape in shapes.items()
    }


def trained(arrays, seed=1, amount=0.1):
    """Adds noise to each number, of `amount` times the array's root mean square."""
    rng = np.random.default_rng(seed)
    return {
        key: (a + rng.normal(0.0, amount, a.shape) * (np.sqrt(np.mean(np.square(a))) or 0.1)).astype(a.dtype)
        for key, a in arrays.items()
    }


def half(arrays):
    return {key: a.astype("float16") for key, a in arrays.items()}


def renamed(keys, change):
    """A dict from new key to key; `change` renames each part of a path."""
    new = {"/".join([*map(change, key.split("/")[:-1]), key.split("/")[-1]]): key for key in keys}
    assert len(new) == len(list(keys))
    return new


def shifted(keys, amount, stems=AUTOMATIC):
    """The keys that Keras would give to a network built later: each counter has advanced by its own amount."""

    def change(part):
        stem, number = re.fullmatch(r"(.+?)(?:_(\d+))?", part).groups()
        if stems is None and number is None or stems is not None and stem not in stems:
            return part
        total = int(number or 0) + amount + (len(stem) % 3 if amount else 0)
        return f"{stem}_{total}" if total else stem

    return renamed(keys, change)


def later_part(keys, amount):
    """The keys of a network cut inside a block, with gaps in their numbers."""
    layers = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
    rng = random.Random(3)
    kept = {layer for layer in layers[: len(layers) // 2] if rng.random() < 0.9}
    return {new: key for new, key in shifted(keys, amount).items() if key.rpartition("/")[0] in kept}


RENAMINGS = {
    "same": lambda keys: {key: key for key in keys},
    "built later": lambda keys: shifted(keys, 188),
    "overlapping": lambda keys: shifted(keys, 1),
    "all numbers shifted": lambda keys: shifted(keys, 2, stems=None),
    "nested, built later": lambda keys: {f"functional_3/{new}": key for new, key in shifted(keys, 94).items()},
    "nested two deep": lambda keys: {f"sequential_4/functional_1/{new}": key for new, key in shifted(keys, 3).items()},
    "nested twice": lambda keys: {f"{n}/{new}": key for n in ("a", "b") for new, key in shifted(keys, 3 + ord(n)).items()},
    "cut": lambda keys: later_part(keys, 0),
    "cut, built later": lambda keys: later_part(keys, 211),
}


def check(found, truth):
    """Asserts that every weight has its true partner, without conflict or ambiguity."""
    assert {key: other for key, other in found.pairs.items() if truth[key] != other} == {}
    assert (found.conflicts, found.ambiguous, found.other_shape) == ({}, {}, {})
    assert len(found.pairs) == len(truth)
    assert list(found.pairs) == list(truth)


def check_honest(found, truth):
    """Asserts that every weight has its true partner, is reported as doubtful, or is not paired."""
    assert {key: other for key, other in found.pairs.items() if truth.get(key) != other and key not in found.doubts} == {}
    assert not found.conflicts


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_under_every_renaming(network):
    keys = shapes(network)
    distinct, constant = tagged(keys), tagged(keys, constant=True)
    for renaming in RENAMINGS.values():
        truth = renaming(keys)
        for known, change in ((distinct, half), (constant, dict), (constant, trained)):
            found = match(change({key: known[other] for key, other in truth.items()}), known)
            check(found, truth)
            assert found.doubts == {}
        check(match({key: keys[other] for key, other in truth.items()}, distinct, values=False), truth)


@pytest.mark.parametrize("network", NETWORKS)
def test_nested_anchors_fit_every_network_that_is_not_nested(network):
    keys = shapes(network)
    arrays = tagged(keys, constant=True)
    for prefix, amount in itertools.product(("backbone", "sequential_2/functional"), (0, 2, 188)):
        truth = {new: f"{prefix}/{key}" for new, key in shifted(keys, amount).items()}
        known = {f"{prefix}/{key}": a for key, a in arrays.items()} | {"dense_1/kernel": np.eye(3, 2)}
        weights = {key: known[other] for key, other in truth.items()}
        check(match(weights, known), truth)
        check(match(trained(weights), known), truth)
        check(match(weights, known, values=False), truth)


@pytest.mark.parametrize("network", NETWORKS)
def test_values_identify_every_layer_under_any_name(network):
    keys = shapes(network)
    known = tagged(keys)
    rng = random.Random(0)
    names = {}
    truth = renamed(keys, lambda part: names.setdefault(part, f"x{rng.getrandbits(64):x}y"))
    weights = {key: known[other] for key, other in truth.items()}
    found = match(weights, known)
    # a layer with fewer than four numbers in each array carries no evidence
    assert {key for key in truth if key not in found.pairs} == {k for k in truth if _is_tiny(k, keys, truth)}
    assert all(truth[key] == other for key, other in found.pairs.items())
    found = match(trained(weights), known)
    check_honest(found, truth)
    kernels = [key for key in truth if len(keys[truth[key]]) > 1 and np.prod(keys[truth[key]]) >= 64]
    assert all(key in found.pairs for key in kernels)


def _is_tiny(key, keys, truth):
    layer = truth[key].rpartition("/")[0]
    return all(np.prod(shape) < 4 for other, shape in keys.items() if other.rpartition("/")[0] == layer)


@pytest.mark.parametrize("network", NETWORKS)
def test_swapped_names_are_followed_or_reported_as_conflicts(network):
    """Layers of equal shapes swap their names but keep their values."""
    keys = shapes(network)
    known = tagged(keys)
    layers = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
    by_signature = {}
    for layer in layers:
        signature = tuple((k.rpartition("/")[2], s) for k, s in keys.items() if k.rpartition("/")[0] == layer)
        by_signature.setdefault(signature, []).append(layer)
    moved = {}
    for group in by_signature.values():
        moved.update(zip(group, group[1:] + group[:1], strict=True))
    truth = {f"{moved[key.rpartition('/')[0]]}/{key.rpartition('/')[2]}": key for key in keys}
    weights = {key: known[other] for key, other in truth.items()}
    found = match(weights, known)
    assert all(truth[key] == found.conflicts.get(key, other) for key, other in found.pairs.items())
    assert set(found.pairs) == set(weights) and found.ambiguous == {}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_new_head_and_weights_that_were_never_loaded_are_noticed(network):
    keys = shapes(network)
    known = tagged(keys, constant=True)
    last = list(keys)[-1].rpartition("/")[0]
    for renaming in ("same", "built later", "nested two deep"):
        truth = RENAMINGS[renaming](keys)
        fresh = tagged({key: keys[other] for key, other in truth.items()}, seed=7, constant=True)
        heads = [key for key in truth if truth[key].startswith(last + "/") and key.endswith("kernel")]
        found = match({key: fresh[key] if key in heads else known[other] for key, other in truth.items()}, known)
        assert list(found.doubts) == heads and len(heads) == 1
        assert found.pairs.get(heads[0], truth[heads[0]]) == truth[heads[0]]
        found = match(fresh, known)
        kernels = {key for key, other in truth.items() if np.prod(keys[other]) >= 64 and len(keys[other]) > 1}
        assert len(kernels - set(found.doubts)) <= 1 and not set(found.doubts) - kernels  # each is missed with probability 6e-5
        assert "have nothing to do with their anchors" in found.warning()
        check(found, truth)


# With Keras itself


def automatic(image=12, classes=3, **options):
    """A small network with Keras' generated layer names; some layers have equal shapes."""
    inputs = keras.Input((image, image, 3), **options)
    x = keras.layers.Conv2D(8, 3)(inputs)
    for _ in range(3):
        y = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
        y = keras.layers.BatchNormalization()(y)
        z = keras.layers.Conv2D(8, 1)(x)
        x = keras.layers.Add()([y, keras.layers.Activation("relu")(z)])
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.SeparableConv2D(9, 3)(x))
    return keras.Model(inputs, keras.layers.Dense(classes)(x))


def by_place(model, known):
    """The true pairs of two models with their weights in the same order."""
    return dict(zip(keyed_weights(model), keyed_weights(known), strict=True))


def filled(model, seed=0):
    rng = np.random.default_rng(seed)
    model.set_weights(
        [rng.normal(1.0, 0.3, a.shape) if a.ndim < 2 else rng.normal(0.0, 0.1, a.shape) for a in model.get_weights()]
    )
    return model


def variants(pretrained, path):
    """Yields models with one model's values and names from each of Keras' naming paths, each with the matching part."""
    for _ in range(2):
        later = automatic()
        later.set_weights(pretrained.get_weights())
        yield later, later
    clone = keras.models.clone_model(pretrained)
    clone.set_weights(pretrained.get_weights())
    yield clone, clone
    pretrained.save(path / "m.keras")
    yield (loaded := load_model(path / "m.keras")), loaded
    later.save(path / "later.keras")
    yield (loaded := load_model(path / "later.keras")), loaded
    for inner in (pretrained, later):
        nested = keras.Sequential([keras.Input((12, 12, 3)), keras.layers.Rescaling(1 / 255), inner])
        yield nested, inner
        yield keras.Sequential([keras.Input((12, 12, 3)), nested]), inner
        inputs = keras.Input((12, 12, 3))
        yield keras.Model(inputs, inner(keras.layers.Conv2D(3, 1)(inputs))), inner


def test_every_way_in_which_keras_gives_names(tmp_path):
    pretrained = filled(automatic())
    anchors = l2sp.Anchors.of(pretrained)
    count = 0
    for model, inner in variants(pretrained, tmp_path):
        values = l2sp.Anchors.of(model)
        place = {id(v): key for key, v in zip(keyed_weights(pretrained), _variables(inner), strict=True)}
        truth = {key: place[id(w.variable)] for key, w in keyed_weights(model).items() if id(w.variable) in place}
        new = set(values) - set(truth)
        for arrays in (values, trained(values), half(values)):
            found = match(arrays, anchors)
            assert all(found.pairs[key] == other for key, other in truth.items())
            assert set(found.pairs) <= set(truth) | set(found.doubts) and new >= set(found.doubts)
        count += 1
    assert count == 11


def _variables(model):
    return [weight.variable for weight in keyed_weights(model).values()]


def test_a_model_cut_at_any_layer_and_built_at_any_time_keeps_its_anchors():
    pretrained = filled(automatic())
    anchors = l2sp.Anchors.of(pretrained)
    later = automatic()
    later.set_weights(pretrained.get_weights())
    for base in (pretrained, later):
        truth = by_place(base, pretrained)
        for layer in base.layers:
            if layer.weights and layer is not base.layers[-1]:
                inputs, output = base.inputs[0], layer.output
                if len(output.shape) == 4:
                    output = keras.layers.GlobalAveragePooling2D()(output)
                model = keras.Model(inputs, keras.layers.Dense(5, name=f"new_{len(output.shape)}")(output))
                found = match(keyed_weights(model), anchors)
                assert found.pairs == {key: truth[key] for key in keyed_weights(model) if not key.startswith("new_")}
                assert found.doubts == {}


@pytest.mark.parametrize("classes", [3, 5])
def test_a_new_head_that_keras_names_is_new_or_doubtful(classes):
    for _ in range(3):  # the new names equal those of the old head, or exceed them
        pretrained = filled(automatic())
        anchors = l2sp.Anchors.of(pretrained)
        features = keras.Model(pretrained.inputs[0], pretrained.layers[-2].output)
        keras.backend.clear_session()
        for _ in range(3):
            model = keras.Model(features.inputs[0], keras.layers.Dense(classes)(features.output))
            found = match(keyed_weights(model), anchors)
            head = {key for key in keyed_weights(model) if key.startswith("dense")}
            assert {key: other for key, other in found.pairs.items() if key not in head} == {
                key: key for key in keyed_weights(features)
            }
            assert head & set(found.pairs) <= (set() if classes == 5 else set(found.doubts))
            assert not set(found.doubts) - head


def test_inception_built_again_has_the_anchors_of_its_own_layers():
    first, later = build("InceptionV3"), build("InceptionV3")
    later.set_weights(first.get_weights())
    anchors = l2sp.Anchors.of(first)
    start = time.process_time()
    found = match(keyed_weights(later), anchors)
    assert time.process_time() - start < 5
    check(found, by_place(later, first))
    assert found.doubts == {}
    assert all(np.array_equal(keyed_weights(later)[key].variable.numpy(), anchors[other]) for key, other in found.pairs.items())


# Callers of `match`


def test_restore_delta_transplant_and_report_find_the_layers_that_keras_renamed(tmp_path):
    pretrained, model, other, third = filled(automatic()), automatic(), filled(automatic(), seed=9), filled(automatic(), seed=8)
    anchors = l2sp.Anchors.of(pretrained)
    x = np.random.default_rng(0).normal(size=(2, 12, 12, 3))
    anchors.restore(model)
    np.testing.assert_array_equal(model(x), pretrained(x))
    layers, new = distances(model, anchors)
    assert new == [] and all(layer.distance == 0 for layer in layers)
    np.testing.assert_array_equal(pretrained_of(model, anchors)(x), pretrained(x))
    model.set_weights([a * np.float32(1.01) for a in model.get_weights()])
    np.testing.assert_array_equal(transplant(model, pretrained)(x), with_head_of(pretrained, model)(x))
    np.testing.assert_array_equal(pretrained_of(model, anchors)(x), pretrained(x))
    size = l2sp.save_delta(model, anchors, tmp_path / "d.safetensors")
    assert sum(size.encodings.values()) == len(anchors)
    entries = json.loads(load_arrays(tmp_path / "d.safetensors", FORMAT, "not a delta", "save_delta")[1]["weights"])
    assert {entry["name"]: entry["anchor"] for entry in entries} == by_place(model, pretrained)
    l2sp.load_delta(other, anchors, tmp_path / "d.safetensors")
    np.testing.assert_array_equal(other(x), model(x))
    nested = keras.Sequential([keras.Input((12, 12, 3)), third])
    anchors.restore(nested)
    np.testing.assert_array_equal(nested(x), pretrained(x))
    np.testing.assert_array_equal(transplant(nested, other)(x), with_head_of(other, pretrained)(x))


def with_head_of(one, other):
    """A copy of `other` with the last layer of `one`."""
    copy = detached_copy(other)
    copy.layers[-1].set_weights(one.layers[-1].get_weights())
    return copy


def test_what_is_ambiguous_stops_restore_and_the_report():
    def towers(names):
        inputs = keras.Input((8,))
        inner = []
        for name in names:
            layers = keras.layers.Dense(9, name="c"), keras.layers.Dense(2, name="h")
            inner.append(keras.Sequential([keras.Input((8,)), *layers], name=name))
        return keras.Model(inputs, [tower(inputs) for tower in inner])

    two, one = filled(towers(["a", "b"])), filled(towers(["z"]), seed=4).layers[-1]
    swapped = towers(["a", "b"])
    swapped.set_weights([*two.get_weights()[4:], *two.get_weights()[:4]])
    with pytest.raises(l2sp.InputError, match="a/c/kernel has the values of b/c/kernel, but the name of a/c/kernel"):
        distances(swapped, l2sp.Anchors.of(two))
    before = l2sp.Anchors.of(one).digest
    with pytest.raises(l2sp.InputError, match=r"c/kernel \(8, 9\) / any of a/c/kernel, b/c/kernel"):
        l2sp.Anchors.of(two).restore(one)
    assert l2sp.Anchors.of(one).digest == before
    with pytest.raises(l2sp.InputError, match="c/kernel may be any of a/c/kernel, b/c/kernel, which differ"):
        distances(one, l2sp.Anchors.of(two))
    with pytest.raises(l2sp.InputError, match="which differ"):
        transplant(two, one)
    l2sp.Anchors.of(one).restore(two)  # one known weight matches two
    assert all(np.array_equal(tower.get_weights()[0], one.get_weights()[0]) for tower in two.layers[1:])


# Each rule, on hand-made examples


def arrays(*keys, shape=(9, 8), seed=0):
    return tagged(dict.fromkeys(keys, shape), seed)


def test_names_fit_at_every_depth():
    a = arrays("c/kernel")["c/kernel"]
    for weights, known, pairs in [
        (["c/kernel"], ["c/kernel"], {"c/kernel": "c/kernel"}),
        (["n/c/kernel"], ["c/kernel"], {"n/c/kernel": "c/kernel"}),
        (["c/kernel"], ["n/m/c/kernel"], {"c/kernel": "n/m/c/kernel"}),
        (["n/c/kernel", "c/kernel"], ["c/kernel"], {"n/c/kernel": "c/kernel", "c/kernel": "c/kernel"}),
        (["a/c/kernel", "b/c/kernel"], ["c/kernel"], {"a/c/kernel": "c/kernel", "b/c/kernel": "c/kernel"}),
        (["n/m/c/kernel"], ["m/c/kernel", "c/kernel"], {"n/m/c/kernel": "m/c/kernel"}),
        (["functional_9/c/kernel"], ["functional_2/c/kernel"], {"functional_9/c/kernel": "functional_2/c/kernel"}),
        (["functional_9/c/kernel"], ["inception/c/kernel"], {"functional_9/c/kernel": "inception/c/kernel"}),
        (["x/kernel"], ["y/kernel"], {}),
        (["c/kernel"], ["c/bias"], {}),
        (["a/x/kernel"], ["b/x/kernel"], {}),
        (["a/kernel", "b/kernel"], ["kernel"], {}),  # a bare layer is not a model of layers
        (["kernel"], ["kernel"], {"kernel": "kernel"}),
    ]:
        assert match(dict.fromkeys(weights, (9, 8)), dict.fromkeys(known, (9, 8)), values=False).pairs == pairs
        if pairs:
            assert match(dict.fromkeys(weights, a), dict.fromkeys(known, a)).pairs == pairs


def test_another_shape_is_reported_and_not_paired():
    found = match(arrays("c/kernel", "c/bias"), arrays("c/kernel", shape=(9, 7)))
    assert found.pairs == {} and found.other_shape == {"c/kernel": "c/kernel"}
    found = match({"c/kernel": (9, 8), "c/bias": (8,)}, {"c/kernel": (7, 8), "c/bias": (8,)}, values=False)
    assert found.pairs == {"c/bias": "c/bias"} and found.other_shape == {"c/kernel": "c/kernel"}


def test_a_name_and_values_that_disagree_are_a_conflict_unless_the_name_is_a_counter():
    known = arrays("a/kernel", "b/kernel")
    for values in ([known["b/kernel"]], list(trained({"b": known["b/kernel"]}, amount=0.02).values())):
        found = match({"a/kernel": values[0]}, known)
        assert found.conflicts == {"a/kernel": "b/kernel"}
        with pytest.raises(l2sp.InputError, match="a/kernel has the values of b/kernel, but the name of a/kernel"):
            found.refuse()
        found.refuse(keys=["other"])
    known = arrays("dense/kernel", "dense_1/kernel")
    found = match({"dense/kernel": known["dense_1/kernel"]}, known)
    assert found.pairs == {"dense/kernel": "dense_1/kernel"} and found.conflicts == {}
    found = match({"c/kernel": known["dense/kernel"]}, known)  # a new layer that starts from an old one
    assert found.pairs == {"c/kernel": "dense/kernel"} and found.conflicts == {}


def test_constant_weights_follow_the_kernel_of_their_layer():
    ones = np.ones(8, "float32")
    kernels = arrays("dense/kernel", "dense_1/kernel", "dense_2/kernel")
    known = kernels | {f"dense{n}/bias": ones for n in ("", "_1", "_2")}
    weights = {"x/kernel": kernels["dense_2/kernel"], "x/bias": ones, "dense_1/kernel": kernels["dense/kernel"]}
    found = match(weights | {"dense_1/bias": ones}, known)
    assert found.pairs["x/bias"] == "dense_2/bias" and found.pairs["dense_1/bias"] == "dense/bias"


def test_equal_layers_are_matched_by_name_then_by_order():
    a = arrays("c/kernel")["c/kernel"]
    known = {"left/c/kernel": a, "right/c/kernel": a}
    assert match(known, known).pairs == {key: key for key in known}
    assert match({"right/c/kernel": a}, known).pairs == {"right/c/kernel": "right/c/kernel"}
    for weights in ({"c/kernel": a}, {"other/kernel": a}):
        found = match(weights, known)
        assert found.pairs == dict.fromkeys(weights, "left/c/kernel") and found.ambiguous == {}
    moved = trained(known)  # both change, by different noise
    assert match(moved, known).pairs == {key: key for key in known}
    assert match(dict.fromkeys(known, 0 * a) | {"c/kernel": a + 1}, known).pairs["left/c/kernel"] == "left/c/kernel"


def test_candidates_that_differ_are_ambiguous_and_named():
    known = arrays("a/c/kernel", "b/c/kernel", "d/c/kernel", "e/c/kernel")
    for found in (match(arrays("c/kernel", seed=3), known), match({"c/kernel": (9, 8)}, known, values=False)):
        assert found.pairs == {} and found.ambiguous == {"c/kernel": tuple(known)}
        with pytest.raises(l2sp.InputError, match="c/kernel may be any of a/c/kernel, b/c/kernel, d/c/kernel and 1 more"):
            found.refuse()
    assert match(trained({"c/kernel": known["d/c/kernel"]}), known).pairs == {"c/kernel": "d/c/kernel"}
    # numbers beyond the known ones: by order they may be any of several
    known = arrays(*(f"dense_{n}/kernel" for n in range(1, 6)))
    found = match({"dense_8/kernel": (9, 8), "dense_9/kernel": (9, 8)}, known, values=False)
    assert set(found.ambiguous) == {"dense_8/kernel", "dense_9/kernel"}


def test_numbers_are_read_as_they_are_unless_the_evidence_says_otherwise():
    known = arrays(*(f"block_{n}/conv/kernel" for n in range(1, 9)))
    cut = {key: known[key] for key in list(known)[2:6]}  # a part from the middle
    for values in (cut, trained(cut), arrays(*cut, seed=8)):
        assert match(values, known).pairs == {key: key for key in cut}
    assert match(cut, known, values=False).pairs == {key: key for key in cut}
    numbered = {f"block_{n}/conv/kernel": a for n, a in enumerate(cut.values(), 1)}  # the same part, renumbered from 1
    for values in (numbered, trained(numbered)):
        assert match(values, known).pairs == dict(zip(numbered, cut, strict=True))
    assert match(numbered, known, values=False).pairs == {key: key for key in numbered}


def test_statistics_that_are_like_those_of_the_next_layer_are_those_of_their_own():
    """Statistics along a residual stream are alike, and data of another task moves them all."""
    rng = np.random.default_rng(0)
    stream = rng.normal(size=256)
    for stem in ("bn{}/moving_mean", "batch_normalization_{}/moving_mean"):
        known = {stem.format(n): (stream + 0.1 * rng.normal(size=256)).astype("float32") for n in range(1, 7)}
        for amount in (0.1, 1.0, 10.0):
            found = match(trained(known, amount=amount), known)
            assert found.pairs == {key: key for key in known} and not found.conflicts and not found.ambiguous


def test_towers_built_in_turns_are_matched_by_rank():
    for depth in (2, 3, 7):
        keys = {f"dense_{n}/kernel": (9, 8 + n % 3) for n in range(depth)}
        known = tagged(keys)
        for start in (0, 1):
            truth = {f"dense_{2 * n + start + 30}/kernel": f"dense_{n}/kernel" for n in range(depth)}
            check(match({key: keys[other] for key, other in truth.items()}, keys, values=False), truth)
            check(match(trained({key: known[other] for key, other in truth.items()}), known), truth)


def test_doubts_name_what_has_nothing_to_do_with_its_anchor():
    known = arrays("a/kernel", "b/kernel", "c/kernel") | {"head/kernel": np.float32([[0.1, -0.2], [0.3, 0.1]])}
    random_start = arrays(*known, seed=5) | {"head/kernel": np.float32([[0.3, 0.2], [-0.1, 0.1]])}
    assert set(match(random_start, known).doubts) == {"a/kernel", "b/kernel", "c/kernel"}  # a small array may agree by chance
    assert set(match({**known, "head/kernel": random_start["head/kernel"]}, known).doubts) == {"head/kernel"}
    found = match({**known, "a/kernel": random_start["a/kernel"]}, known)
    assert found.doubts == {"a/kernel": pytest.approx(1.4, abs=0.2)}
    assert found.warning().startswith("The values of a/kernel (||w - w0|| = ") and found.warning(keys=["b/kernel"]) is None
    zero = {key: np.zeros_like(a) for key, a in known.items()}
    one = {key: np.ones_like(a) for key, a in known.items()}
    assert match(random_start, zero).doubts == {} and match(random_start, one).doubts == {}
    assert set(match(zero, known).doubts) == {"a/kernel", "b/kernel", "c/kernel"}
    assert match(known, known).doubts == {} and match(known, known).warning() is None


@pytest.mark.parametrize("amount", [1e-3, 0.1, 0.4])
def test_training_raises_no_doubt_and_loses_no_layer(amount):
    for seed in range(20):
        known = arrays(*(f"{name}/kernel" for name in "abcdef"), shape=(8, 8), seed=seed)
        found = match(trained(known, seed + 100, amount), known)
        check(found, {key: key for key in known})
        assert found.doubts == {}
        half = {**known, **{key: trained(known, seed, amount)[key] for key in list(known)[:3]}}  # a few layers frozen
        assert match(half, known).doubts == {}


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float64"])
def test_precision_does_not_hide_that_arrays_are_equal(dtype):
    known = arrays("dense/kernel", "dense_1/kernel", "dense_2/kernel", shape=(3, 4))
    weights = {"dense_7/kernel": known["dense_2/kernel"].astype(dtype), "x/kernel": known["dense/kernel"].astype(dtype)}
    pairs = {"dense_7/kernel": "dense_2/kernel", "x/kernel": "dense/kernel"}
    assert match(weights, known).pairs == pairs
    back = match(known, weights).pairs
    assert {other: key for key, other in pairs.items()}.items() <= back.items()


def test_numbers_that_are_not_finite_and_odd_arrays_do_no_harm():
    odd = {
        "a/kernel": np.full((9, 8), np.nan, "float32"),
        "b/kernel": np.full((9, 8), np.inf, "float32"),
        "c/kernel": np.where(np.eye(9, 8) > 0, np.float32(3e38), np.float32(1e-38)),
        "d/count": np.array(3, "int32"),
        "e/mask": np.eye(9, 8).astype(bool),
        "f/empty": np.zeros((0, 3), "float32"),
        "g/table": np.arange(12, dtype="int64").reshape(3, 4),
    }
    for weights, known in ((odd, odd), (odd, {k: a * 0 + 1 for k, a in odd.items()}), ({k: a * 0 for k, a in odd.items()}, odd)):
        assert match(weights, known).pairs == {key: key for key in odd}
    assert match(odd, odd).doubts == {}


def test_any_string_is_a_key():
    keys = ["", "/", "//", "#", "a//b", "/kernel", "_3/kernel", "_/kernel", "x_\u00b2/kernel", "x_\u0663/kernel", "a\nb_1/kernel"]
    keys += ["a/#2", "k#2", "x_007/k", "x_" + "9" * 5000 + "/k", "/".join("a" * 5000) + "/kernel", "x_1#2/kernel#3"]
    for key in keys:
        assert match({key: (2, 3)}, {key: (2, 3)}, values=False).pairs == {key: key}
    found = match(dict.fromkeys(keys, (2, 3)), dict.fromkeys(reversed(keys), (2, 3)), values=False)
    assert found.pairs == {key: key for key in keys}


def test_the_order_of_the_dicts_does_not_matter():
    keys = shapes("InceptionV3")
    known = tagged(keys, constant=True)
    truth = RENAMINGS["nested, built later"](keys)
    for seed in range(2):
        mixed = random.Random(seed).sample(list(truth), len(truth))
        shuffled = {key: known[key] for key in random.Random(seed + 9).sample(list(known), len(known))}
        check(match({key: known[truth[key]] for key in mixed}, shuffled), {key: truth[key] for key in mixed})


def test_five_hundred_layers_take_a_moment():
    keys = {
        f"dense_{n}/{name}": shape for n in range(500) for name, shape in (("kernel", (9, 8 + n % 5)), ("bias", (8 + n % 5,)))
    }
    known = tagged(keys, constant=True)
    truth = shifted(keys, 37)
    weights = trained({key: known[other] for key, other in truth.items()})
    for values in (True, False):
        start = time.process_time()
        check(match(weights, known, values=values), truth)
        assert time.process_time() - start < 10
