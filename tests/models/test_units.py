"""Units of the networks of keras.applications: nothing upstream of a frozen unit trains, by gradients and by moved weights."""

import contextlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import l2sp_tf as l2sp
from l2sp_tf.evaluation.activations import activation_r2
from l2sp_tf.models import keras_files, zoo
from l2sp_tf.models.units import freeze_first, unfreeze, units

LAYERS = keras.layers
OPTIONS = {"weights": None, "classes": 3, "classifier_activation": None}


def module_of(name):
    return sys.modules[getattr(keras.applications, name).__module__]


def application(name, side=32, **options):
    return getattr(keras.applications, name)(input_shape=(side, side, 3), **OPTIONS | options)


def smaller(public, base, *arguments, **options):
    """Builds a small network with the general constructor that stands beside a public name in its module."""
    return getattr(module_of(public), base)(*arguments, **OPTIONS | options, input_shape=(32, 32, 3))


def resnet(preact):
    module = module_of("ResNet50")
    stack = module.stack_residual_blocks_v2 if preact else module.stack_residual_blocks_v1

    def stacks(x):
        return stack(stack(x, 4, 2, stride1=1, name="conv2"), 8, 2, name="conv3")

    return smaller("ResNet50", "ResNet", stacks, preact, True)


def inception_resnet():
    """InceptionResNetV2 with the first blocks of each kind and its last block."""
    module = module_of("InceptionResNetV2")
    with pytest.MonkeyPatch.context() as patch:
        block = module.inception_resnet_block
        kept = {("block35", 1), ("block35", 2), ("block17", 1), ("block8", 1), ("block8", 10)}
        patch.setattr(
            module,
            "inception_resnet_block",
            lambda x, **named: block(x, **named) if (named["block_type"], named["block_idx"]) in kept else x,
        )
        return application("InceptionResNetV2", 75)


def cut(model, name):
    """Cuts a network off after a layer."""
    return keras.Model(model.input, model.get_layer(name).output)


def xception():
    """Xception up to its fourth block, which ends in an unnamed sum."""
    model = application("Xception", 71)
    return keras.Model(model.input, model.get_layer("block5_sepconv1_act").input)


def small(name="small_resnet"):
    return zoo.small_resnet((8, 8, 3), 3, widths=(4, 8), depths=(1, 2), name=name)


SMALL = {  # one of each family, most cut short: its builder, and its number of units
    "small_resnet": (small, 4),
    "resnet18_torch": (lambda: zoo.published_network("resnet18_torch", 3, 32), 9),
    "ResNet": (lambda: resnet(False), 5),
    "ResNetV2": (lambda: resnet(True), 5),
    "DenseNet": (lambda: smaller("DenseNet121", "DenseNet", (2, 1, 1, 2)), 7),
    "VGG16": (lambda: application("VGG16", include_top=False), 5),
    "Xception": (xception, 4),
    "MobileNet": (lambda: application("MobileNet", alpha=0.25), 14),
    "MobileNetV2": (lambda: cut(application("MobileNetV2", alpha=0.35), "block_3_project_BN"), 5),
    "MobileNetV3Small": (lambda: cut(application("MobileNetV3Small", alpha=0.35), "expanded_conv_4_add"), 6),
    "EfficientNet": (lambda: smaller("EfficientNetB0", "EfficientNet", 0.25, 0.3, 32), 9),
    "EfficientNetV2": (lambda: smaller("EfficientNetV2B0", "EfficientNetV2", 0.25, 0.1, 32, name="efficientnetv2-b0"), 7),
    "ConvNeXt": (lambda: smaller("ConvNeXtTiny", "ConvNeXt", (1, 2, 1, 1), (4, 8, 12, 16)), 6),
    "NASNet": (lambda: cut(smaller("NASNetMobile", "NASNet", num_blocks=1, penultimate_filters=96), "normal_concat_2"), 6),
    "InceptionV3": (lambda: cut(application("InceptionV3", 75), "mixed3"), 5),
    "InceptionResNetV2": (inception_resnet, 9),
}
UNITS = {  # the units of every network of keras.applications
    **dict.fromkeys(["ConvNeXtTiny"], 19),
    **dict.fromkeys(["ConvNeXtSmall", "ConvNeXtBase", "ConvNeXtLarge", "ConvNeXtXLarge"], 37),
    **{"DenseNet121": 59, "DenseNet169": 83, "DenseNet201": 99},
    **{f"EfficientNetB{number}": count for number, count in enumerate((17, 24, 24, 27, 33, 40, 46, 56))},
    **{"EfficientNetV2B0": 22, "EfficientNetV2B1": 28, "EfficientNetV2B2": 29, "EfficientNetV2B3": 33},
    **{"EfficientNetV2S": 41, "EfficientNetV2M": 58, "EfficientNetV2L": 80},
    **{"InceptionV3": 12, "InceptionResNetV2": 44, "MobileNet": 14, "MobileNetV2": 18, "MobileNetV3Small": 12},
    **{"MobileNetV3Large": 16, "NASNetMobile": 17, "NASNetLarge": 23, "VGG16": 5, "VGG19": 5, "Xception": 14},
    **{f"ResNet{depth}{version}": 1 + depth // 3 for depth in (50, 101, 152) for version in ("", "V2")},
}


@contextlib.contextmanager
def recorded(layers):
    """Keeps the output of each given layer, nested or not, when the model is called."""
    outputs = {}

    def recording(layer, call):
        def noted(*arguments, **named):
            outputs[layer] = call(*arguments, **named)
            return outputs[layer]

        return noted

    for layer in layers:
        object.__setattr__(layer, "call", recording(layer, layer.call))
    try:
        yield outputs
    finally:
        for layer in layers:
            object.__delattr__(layer, "call")


def images_for(model, batch=2):
    images = np.random.default_rng(0).uniform(size=(batch, *model.input_shape[1:])).astype("float32")
    return images * 255 if "rescaling" in model.layers[1].name else images


def trainable(model):
    """Returns, by identity, the weights that a step would change according to Keras."""
    return {id(variable) for variable in model.trainable_variables}


def upstream(model, images, ends):
    """Finds, for each layer, the weights that its output has a gradient with respect to: an oracle that ignores names."""
    unfreeze(model)
    weights = model.trainable_variables
    with tf.GradientTape(persistent=True) as tape, recorded(ends) as outputs:
        model(images, training=False)
    found = []
    for end in ends:
        gradients = tape.gradient(outputs[end], weights)
        found.append({id(w) for w, gradient in zip(weights, gradients, strict=True) if gradient is not None})
    return found


def outputs_of(model, images, layer, training):
    """Returns the output of a layer, with the same random numbers in every call."""
    statistics = {id(variable) for variable in model.weights}
    seeds = [variable for variable in model.variables if id(variable) not in statistics]
    before = [variable.numpy() for variable in seeds]
    with recorded([layer]) as outputs:
        model(images, training=training)
    for variable, value in zip(seeds, before, strict=True):
        variable.assign(value)
    return outputs[layer].numpy()


def check_that_frozen_units_stand(model, images, n):
    """Checks that the frozen part computes the same bits for any trainable weights, also while batch norm trains."""
    end = units(model)[n - 1][-1]
    freeze_first(model, n)
    before = model.get_weights()
    expected = [outputs_of(model, images, end, training) for training in (False, True)]
    assert np.isfinite(expected[0]).all() and np.ptp(expected[0]) > 0
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(variable + rng.normal(0, 0.1, variable.shape))
    for training, value in zip((False, True), expected, strict=True):
        np.testing.assert_array_equal(outputs_of(model, images, end, training), value)
    model.set_weights(before)


def check_network(model, count, numbers, beside=(), move=True):
    """Checks all invariants of freezing for these numbers of units; `beside` lists the units with an unnamed shortcut."""
    images = images_for(model)
    found = units(model)
    assert len(found) == count
    unfreeze(model)
    everything = trainable(model)
    above = dict(zip(numbers, upstream(model, images, [found[n - 1][-1] for n in numbers]), strict=True))
    for n in numbers:
        assert freeze_first(model, n) == count
        frozen = everything - trainable(model)
        assert above[n] <= frozen
        shortcut = frozen - above[n]
        assert len(shortcut) == (3 if n in beside else 0)  # a kernel, and gamma and beta
        assert not any(shortcut & above[m] for m in numbers if m <= n)
        assert all(frozen <= above[m] for m in numbers if m > n)
    if move:
        check_that_frozen_units_stand(model, images, numbers[len(numbers) // 2])
    assert freeze_first(model, 0) == count and trainable(model) == everything
    assert all(layer.trainable for layer in model._flatten_layers())


LONG = ("resnet18_torch", "InceptionV3", "NASNet", "InceptionResNetV2", "EfficientNetV2", "MobileNetV3Small")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in SMALL])
def test_nothing_upstream_of_a_frozen_unit_trains_and_all_downstream_does(name):
    make, count = SMALL[name]
    model, beside = make(), {2, 3, 4} if name == "Xception" else ()
    check_network(model, count, sorted({1, count // 2, count - 1, count} | set(beside)), beside)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(UNITS))
def test_every_network_of_keras_applications_has_its_units(name, monkeypatch):
    if name.startswith("ConvNeXt"):  # they have the same layers, but up to 350 million weights
        for config in module_of(name).MODEL_CONFIGS.values():
            monkeypatch.setitem(config, "projection_dims", [4, 8, 12, 16])
    side = 75 if name.startswith("Inception") else 71 if name == "Xception" else 32
    model, count = application(name, side, include_top=False), UNITS[name]
    beside = {2, 3, 4, 13} if name == "Xception" else ()
    check_network(model, count, sorted({1, 2, count // 2, count - 1, count} | set(beside)), beside)


def test_the_networks_of_keras_applications_are_all_in_the_table():
    names = {name for name in dir(keras.applications) if name[0].isupper() and callable(getattr(keras.applications, name))}
    assert names == set(UNITS)


def test_freezing_counts_units_and_includes_batch_norm():
    model = small()
    assert freeze_first(model, 2) == len(units(model)) == 4
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.random.default_rng(0).normal(size=(4, 8, 8, 3)), np.zeros(4)
    for frozen in (("conv1_", "conv2_block1_"), ()):
        before = [weight.numpy() for weight in model.weights]
        model.fit(x, y, verbose=0)
        for weight, value in zip(model.weights, before, strict=True):
            assert np.array_equal(weight.numpy(), value) == weight.path.startswith(frozen or "none"), weight.path
        assert freeze_first(model, 0) == 4  # the compiled model then traces its step again
        model.compile("sgd", model.loss)


def test_units_end_where_the_activations_of_a_resnet_are_compared():
    ends = ["conv1_relu", "conv2_block1_out", "conv3_block1_out", "conv3_block2_out"]
    assert [unit[-1].name for unit in units(small())] == ends
    assert len(units(zoo.backbone("resnet50", 10, image_size=32))) == 1 + 3 + 4 + 6 + 3


def wrapped(backbone, levels=1):
    """A network with the backbone as one layer, between an adapter and a head: nested once or twice."""
    shape = backbone.input_shape[1:]
    inputs = keras.Input(shape)
    x = LAYERS.Conv2D(3, 1, name="adapter")(LAYERS.Rescaling(1 / 255)(inputs))
    x = backbone(x)
    x = LAYERS.GlobalAveragePooling2D()(x) if len(x.shape) == 4 else x
    model = keras.Model(inputs, LAYERS.Dense(4, name="top")(x))
    if levels > 1:
        model = keras.Sequential([keras.Input(shape), LAYERS.Rescaling(1.0), model, LAYERS.Dense(3, name="last")])
    return model


def saved_and_loaded(model, path):
    model.save(path / "m.keras")
    return keras_files.load_model(path / "m.keras")


WAYS = {
    "with a new head": lambda model, path: l2sp.with_new_head(model, 4, seed=0),
    "loaded": saved_and_loaded,
    "cloned": lambda model, path: keras.models.clone_model(model),
    "nested": lambda model, path: wrapped(model),
    "nested twice": lambda model, path: wrapped(model, 2),
    "nested and loaded": lambda model, path: saved_and_loaded(wrapped(model), path),
}
QUICK = {"DenseNet nested twice", "Xception nested and loaded"}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[pytest.mark.slow] * (name != "small_resnet" and f"{name} {way}" not in QUICK))
        for name in SMALL
        for way in WAYS
    ],
)
def test_a_network_keeps_its_units_wherever_it_stands(name, way, tmp_path):
    make, count = SMALL[name]
    keras.Sequential([LAYERS.Conv2D(1, 1), LAYERS.Conv2D(1, 1), LAYERS.BatchNormalization()])  # Keras numbers on from these
    model = WAYS[way](make(), tmp_path)
    check_network(model, count, [1, count - 1, count], {2, 3, 4} if name == "Xception" else (), move=name == "small_resnet")
    freeze_first(model, 1)
    assert not [w.path for w in model.trainable_weights if "adapter" in w.path]


def weights_by_name(model, trains):
    return {weight.path.rpartition("/")[0].rpartition("/")[2] for weight in model.weights if weight.trainable == trains}


@pytest.mark.parametrize("n", [1, 4])
def test_a_branch_beside_the_network_trains_and_what_feeds_it_does_not(n):
    image, facts = keras.Input((8, 8, 3)), keras.Input((5,))
    base = zoo.small_resnet((8, 8, 3), 3, widths=(4, 8), depths=(1, 2))
    two = keras.Model(  # one nested model feeds both branches: only what the network reads is upstream
        [image, facts], [LAYERS.Conv2D(3, 1, name="before")(image), LAYERS.Dense(4, name="beside")(facts)], name="two"
    )
    image, facts = keras.Input((8, 8, 3)), keras.Input((5,))
    seen, said = two([image, LAYERS.Dense(5, name="facts")(facts)])
    side = LAYERS.GlobalAveragePooling2D()(LAYERS.Conv2D(2, 3, name="side")(image))
    both = LAYERS.Concatenate()([base(seen), said, side])
    model = keras.Model([image, facts], LAYERS.Dense(3, name="top")(both))
    assert freeze_first(model, n) == 4
    assert {"before", "conv1_conv"} <= weights_by_name(model, False)
    assert weights_by_name(model, True) >= {"beside", "facts", "side", "top", "predictions"}
    assert not {"beside", "facts", "side", "top", "predictions"} & weights_by_name(model, False)


def test_a_network_called_twice_is_frozen_with_all_that_either_call_reads():
    first, second, base = keras.Input((8, 8, 3)), keras.Input((8, 8, 3)), small()
    pair = [base(LAYERS.Conv2D(3, 1, name=name)(x)) for name, x in (("left", first), ("right", second))]
    model = keras.Model([first, second], LAYERS.Dense(2, name="top")(LAYERS.Concatenate()(pair)))
    assert freeze_first(model, 2) == 4
    assert {"left", "right", "conv1_conv", "conv2_block1_1_bn"} <= weights_by_name(model, False)
    assert "top" in weights_by_name(model, True)


def test_lateral_layers_of_a_pyramid_train_whatever_is_frozen():
    base = small()
    levels = [base.get_layer(f"conv{block}_out").output for block in ("2_block1", "3_block2")]
    deep = LAYERS.UpSampling2D()(LAYERS.Conv2D(4, 1, name="deep")(levels[1]))
    model = keras.Model(base.input, LAYERS.Add()([LAYERS.Conv2D(4, 1, name="lateral")(levels[0]), deep]))
    for n in range(5):
        freeze_first(model, n)
        assert {"deep", "lateral"} <= weights_by_name(model, True)


@pytest.mark.parametrize("first", [1, 4])
def test_the_last_call_of_freeze_first_counts(first):
    model, expected = small(), small()
    freeze_first(model, first)
    for n in (2, 0, 4):
        freeze_first(model, n)
        freeze_first(fresh := small(), n)
        assert [w.trainable for w in model.weights] == [w.trainable for w in fresh.weights]
        assert [layer.trainable for layer in model.layers] == [layer.trainable for layer in fresh.layers]
    freeze_first(model, 0)
    assert [w.trainable for w in model.weights] == [w.trainable for w in expected.weights]


def plain(*names):
    """A chain of convolutions with these names."""
    x = inputs = keras.Input((8, 8, 3))
    for name in names:
        x = LAYERS.BatchNormalization(name=name)(x)
    return keras.Model(inputs, LAYERS.Dense(2)(LAYERS.Flatten()(x)), name="plain")


def side_by_side(*networks):
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, LAYERS.Concatenate()([LAYERS.Flatten()(network(inputs)) for network in networks]), name="pair")


class Mine(keras.Model):
    def __init__(self):
        super().__init__(name="mine")
        self.base = small()

    def call(self, x):
        return self.base(x)


REFUSED = {
    "no name of a family": (
        lambda: plain("a", "b"),
        "The model 'plain' has no layers named as the units of a network of keras.applications",
    ),
    "only a first unit": (lambda: plain("conv1_conv", "conv1_bn"), "has no layers named as"),
    "only blocks": (lambda: plain("conv2_block1_1_bn", "conv3_block1_1_bn"), "has no layers named as"),
    "one end": (lambda: plain("a", "mixed0"), "has no layers named as"),
    "ends without a convolution": (lambda: plain("a", "mixed0", "mixed1"), "has no layers named as"),
    "a first unit of another family": (lambda: plain("stem_conv", "conv2_block1_1_bn"), "has no layers named as"),
    "a name out of place": (
        lambda: plain("conv1_conv", "conv2_block1_1_bn", "conv1_bn"),
        "The units of the model 'plain' do not follow one another",
    ),
    "two of a family": (lambda: side_by_side(small("one"), small("other")), "'pair' holds more than one network of known units"),
    "two families": (
        lambda: side_by_side(small(), plain("stem_conv", "block1a_bn")),
        "'pair' holds more than one network of known units",
    ),
    "subclassed": (Mine, "'mine' is subclassed or not built"),
    "not built": (lambda: keras.Sequential([LAYERS.Dense(2)], name="no_input"), "'no_input' is subclassed or not built"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_networks_without_known_units_are_refused_and_left_as_they_are(case):
    make, reason = REFUSED[case]
    model = make()
    for layer in model.layers:
        layer.trainable = False
    with pytest.raises(l2sp.InputError, match=reason):
        freeze_first(model, 1)
    assert not any(layer.trainable for layer in model.layers)


def test_a_number_of_units_out_of_range_is_refused():
    for n in (-1, 5, 1.0, True):
        with pytest.raises(l2sp.InputError, match="has 4 units: give a number from 0 to 4"):
            freeze_first(small(), n)


def attended():
    inputs = keras.Input((4, 6))
    return keras.Model(inputs, LAYERS.Dense(2)(LAYERS.MultiHeadAttention(2, 3)(inputs, inputs)))


def stacked(*layers, shape=(4, 6)):
    return lambda: keras.Sequential([keras.Input(shape), *(make() for make in layers)])


MADE_OF_LAYERS = {
    "batch norm": stacked(lambda: LAYERS.Dense(3), LAYERS.BatchNormalization, lambda: LAYERS.BatchNormalization(scale=False)),
    "recurrent": stacked(lambda: LAYERS.Bidirectional(LAYERS.LSTM(2)), lambda: LAYERS.Dense(2)),
    "stacked cells": stacked(lambda: LAYERS.RNN([LAYERS.GRUCell(2), LAYERS.LSTMCell(3)])),
    "attention": attended,
    "wrapped": stacked(lambda: LAYERS.TimeDistributed(LAYERS.Dense(2)), lambda: LAYERS.SpectralNormalization(LAYERS.Dense(3))),
    "statistics": stacked(LAYERS.Normalization, lambda: LAYERS.Dropout(0.5), lambda: LAYERS.Dense(2)),
    "low rank": stacked(lambda: LAYERS.Dense(3, lora_rank=1), lambda: LAYERS.Conv1D(2, 1, lora_rank=1)),
    "low rank words": stacked(lambda: LAYERS.Embedding(5, 3, lora_rank=1), lambda: LAYERS.Dense(2), shape=(4,)),
    "made frozen": stacked(lambda: LAYERS.Dense(3, trainable=False), lambda: LAYERS.GroupNormalization(3, trainable=False)),
    "nested": lambda: wrapped(small(), 2),
}


def freeze_inner_layers(model):
    for layer in model._flatten_layers(include_self=False):
        layer.trainable = False
    model.trainable = False


def freeze_outside_in(model):
    """Leaves the outer layers trainable and freezes the layers inside them."""
    freeze_inner_layers(model)
    for layer in model.layers:
        layer._trainable = True
    model._trainable = True


def freeze_variables(model):
    for variable in model.weights:
        variable.trainable = False


@pytest.mark.parametrize(
    ("freeze", "loaded"),
    [(freeze_inner_layers, True), (freeze_inner_layers, False), (freeze_outside_in, False), (freeze_variables, False)],
)
@pytest.mark.parametrize("name", list(MADE_OF_LAYERS))
def test_unfreezing_leaves_nothing_frozen_but_what_never_trains(name, freeze, loaded, tmp_path):
    model = MADE_OF_LAYERS[name]()
    never = ("moving_", "mean", "variance", "count", "seed", "vector_u")
    freeze(model)
    if loaded:
        model = saved_and_loaded(model, tmp_path)
    unfreeze(model)
    for weight in model.weights:
        low_rank = weight.name in ("kernel", "embeddings") and name.startswith("low rank") and owner(model, weight).lora_enabled
        expected = not weight.name.startswith(never) and not low_rank
        assert weight.trainable == expected, weight.path
    assert all(layer.trainable for layer in model._flatten_layers())


def owner(model, weight):
    return next(layer for layer in model.layers if any(weight is own for own in layer.weights))


@pytest.mark.parametrize("levels", [1, 2])
def test_activations_are_compared_at_the_units_of_a_nested_network(levels):
    base = small()
    model = wrapped(base, levels)
    images = images_for(model, 8)
    found = activation_r2(model, model, [images])
    assert list(found) == [unit[-1].name for unit in units(base)]
    with recorded([base.get_layer(name) for name in found]) as outputs:
        model(images, training=False)
    for name, values in found.items():
        varies = np.var(outputs[base.get_layer(name)].numpy().reshape(-1, len(values)), 0) > 1e-12
        np.testing.assert_allclose(values[varies], 1)
        assert np.isnan(values[~varies]).all() and varies.any()
