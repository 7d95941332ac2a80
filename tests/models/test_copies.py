"""A copy computes what its model computes, whatever state the layers keep; if it cannot, the error names the layer."""

import inspect

import keras
import networks
import numpy as np
import pytest
from keras import layers
from networks import FAMILIES, MAKERS, adapted, network

import l2sp_tf as l2sp
from l2sp_tf.models import copies, keras_files
from l2sp_tf.models.copies import detached_copy
from l2sp_tf.penalties.assignment import assign
from l2sp_tf.penalties.weights import keyed_weights
from l2sp_tf.training import devices

IMAGE, SEQUENCE, VOLUME, VECTOR = (8, 8, 3), (6, 4), (6, 6, 6, 2), (5,)
TIMES_IMAGE, TIMES_VOLUME, TIMES_SEQUENCE = (3, 8, 4), (3, 6, 6, 2), (3, 6, 6, 6, 2)
WORDS = np.array([["cat"], ["dog"], ["cat"], ["cow"]], object)


def vocabulary(layer, data):
    layer.adapt(data)
    return layer


def changed_vocabulary():
    """A lookup layer whose vocabulary was changed after construction."""
    layer = layers.StringLookup(vocabulary=["a", "b"])
    layer.set_vocabulary(["cat", "line\nend", " "])
    return layer


def of_cells():
    return layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)])


def frozen_inside():
    layer = layers.MultiHeadAttention(2, 3)
    layer.build((None, *SEQUENCE), (None, *SEQUENCE))
    layer._key_dense.trainable = False
    return layer


def lora():
    layer = layers.Dense(3)
    layer.build((None, *VECTOR))
    layer.enable_lora(2)
    return layer


def quantized(mode):
    layer = layers.Dense(3)
    layer.build((None, *VECTOR))
    layer.quantize(mode)
    return layer


def scaled(x):
    return x * np.float32(3)


# For each layer a maker or constructor arguments, and the shape of its input, or of each of its inputs.
ARGUMENTS = {
    "Activation": (("relu",), VECTOR),
    "ActivityRegularization": ((), VECTOR),
    "Add": ((), [VECTOR, VECTOR]),
    "AlphaDropout": ((0.5,), VECTOR),
    "Average": ((), [VECTOR, VECTOR]),
    "AdditiveAttention": ((), "attention"),
    "Attention": (lambda: layers.Attention(use_scale=True), "attention"),
    "BatchNormalization": ((), IMAGE),
    "Bidirectional": (lambda: layers.Bidirectional(layers.LSTM(3)), SEQUENCE),
    "CategoryEncoding": (lambda: layers.CategoryEncoding(4, output_mode="count"), ("int32", VECTOR)),
    "CenterCrop": ((4, 4), IMAGE),
    "Concatenate": ((), [VECTOR, VECTOR]),
    "Dense": ((3,), VECTOR),
    "Discretization": (lambda: vocabulary(layers.Discretization(num_bins=3), np.arange(30.0) ** 2), VECTOR),
    "Dot": ((1,), [VECTOR, VECTOR]),
    "Dropout": ((0.5,), VECTOR),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cd->abd", output_shape=(None, 3), bias_axes="d"), SEQUENCE),
    "ELU": ((), VECTOR),
    "Embedding": ((9, 3), ("int32", VECTOR)),
    "Flatten": ((), IMAGE),
    "GaussianDropout": ((0.5,), VECTOR),
    "GaussianNoise": ((0.5,), VECTOR),
    "GroupNormalization": ((1,), IMAGE),
    "GroupQueryAttention": ((4, 4, 2), "attention"),
    "GRU": ((3,), SEQUENCE),
    "HashedCrossing": ((5,), [("int32", (1,)), ("int32", (1,))]),
    "Hashing": ((5,), ("int32", VECTOR)),
    "Identity": ((), VECTOR),
    "IntegerLookup": (lambda: vocabulary(layers.IntegerLookup(), np.array([[1], [0], [1]])), ("int64", VECTOR)),
    "Lambda": (lambda: layers.Lambda(lambda x: np.pi * x), VECTOR),
    "LayerNormalization": ((), VECTOR),
    "LeakyReLU": ((), VECTOR),
    "LSTM": ((3,), SEQUENCE),
    "Masking": ((), SEQUENCE),
    "Maximum": ((), [VECTOR, VECTOR]),
    "MelSpectrogram": (lambda: layers.MelSpectrogram(fft_length=64, sequence_stride=16, num_mel_bins=4), (200,)),
    "Minimum": ((), [VECTOR, VECTOR]),
    "MultiHeadAttention": (frozen_inside, "attention"),
    "Multiply": ((), [VECTOR, VECTOR]),
    "Normalization": (adapted, VECTOR),
    "Permute": (((2, 1),), SEQUENCE),
    "Pipeline": (lambda: layers.Pipeline([layers.Rescaling(2.0), layers.Dense(3)]), VECTOR),
    "PReLU": ((), VECTOR),
    "ReLU": ((), VECTOR),
    "RepeatVector": ((2,), VECTOR),
    "Rescaling": ((2.0,), VECTOR),
    "Reshape": (((1, 5),), VECTOR),
    "Resizing": ((4, 4), IMAGE),
    "ReversibleEmbedding": ((9, 3), ("int32", VECTOR)),
    "RMSNormalization": ((), VECTOR),
    "RNN": (of_cells, SEQUENCE),
    "SimpleRNN": ((3,), SEQUENCE),
    "Softmax": ((), VECTOR),
    "SpectralNormalization": (lambda: layers.SpectralNormalization(layers.Dense(3)), VECTOR),
    "STFTSpectrogram": (lambda: layers.STFTSpectrogram(frame_length=32, frame_step=16, fft_length=32), (200, 1)),
    "StringLookup": (lambda: vocabulary(layers.StringLookup(), WORDS), ("string", (3,))),
    "Subtract": ((), [VECTOR, VECTOR]),
    "TextVectorization": (lambda: vocabulary(layers.TextVectorization(output_mode="tf_idf"), WORDS), ("string", ())),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(3)), SEQUENCE),
    "UnitNormalization": ((), VECTOR),
    "AdaptiveAveragePooling1D": ((2,), SEQUENCE),
    "AdaptiveAveragePooling2D": ((2,), IMAGE),
    "AdaptiveAveragePooling3D": ((2,), VOLUME),
    "AdaptiveMaxPooling1D": ((2,), SEQUENCE),
    "AdaptiveMaxPooling2D": ((2,), IMAGE),
    "AdaptiveMaxPooling3D": ((2,), VOLUME),
    "ContrastLimitedAdaptiveHistogramEqualization": ((), IMAGE),
    "ConvLSTM1D": ((2, 3), TIMES_IMAGE),
    "ConvLSTM2D": ((2, 3), TIMES_VOLUME),
    "ConvLSTM3D": ((2, 3), TIMES_SEQUENCE),
    "RandomCrop": ((4, 4), IMAGE),
    "RandomZoom": ((0.2,), IMAGE),
    "RandomTranslation": ((0.2, 0.2), IMAGE),
}
FACTORS = ("Brightness", "ColorDegeneration", "Contrast", "Hue", "Posterization", "Rotation", "Saturation", "Sharpness")
ARGUMENTS |= {f"Random{name}": ((0.5,), IMAGE) for name in FACTORS}
ARGUMENTS["RandomPosterization"] = ((4,), IMAGE)
ARGUMENTS["RandomHue"] = (lambda: layers.RandomHue(0.5, value_range=(0, 1)), IMAGE)
ARGUMENTS["RandomSaturation"] = (lambda: layers.RandomSaturation(0.5, value_range=(0, 1)), IMAGE)
ARGUMENTS["RandomSharpness"] = (lambda: layers.RandomSharpness(0.5, value_range=(0, 1)), IMAGE)
WHOLE = ("ElasticTransform", "Erasing", "Flip", "GaussianBlur", "Grayscale", "Invert", "Perspective", "Shear", "ColorJitter")
ARGUMENTS |= {f"Random{name}": ((), IMAGE) for name in WHOLE}
for name in ("AugMix", "AutoContrast", "CutMix", "MixUp", "RandAugment", "Solarization"):
    ARGUMENTS[name] = ((), IMAGE)
for rank, shape in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME)):
    for name in ("AveragePooling", "MaxPooling"):
        ARGUMENTS[f"{name}{rank}D"] = ((2,), shape)
    for name in ("GlobalAveragePooling", "GlobalMaxPooling", "UpSampling", "ZeroPadding"):
        ARGUMENTS[f"{name}{rank}D"] = ((), shape)
    ARGUMENTS[f"Cropping{rank}D"] = ((1,), shape)
    ARGUMENTS[f"SpatialDropout{rank}D"] = ((0.5,), shape)
    for name in ("Conv{}D", "Conv{}DTranspose", "SeparableConv{}D"):
        ARGUMENTS[name.format(rank)] = ((2, 3), shape)
    ARGUMENTS[f"DepthwiseConv{rank}D"] = ((3,), shape)
del ARGUMENTS["SeparableConv3D"], ARGUMENTS["DepthwiseConv3D"]  # Keras has no such layer
# More states that layers can be in.
STATES = {
    "a vocabulary set later": (changed_vocabulary, ("string", (3,))),
    "a vocabulary of one-hot vectors": (
        lambda: vocabulary(layers.StringLookup(output_mode="multi_hot", pad_to_max_tokens=True, max_tokens=9), WORDS),
        ("string", (3,)),
    ),
    "an inverted lookup": (lambda: layers.StringLookup(vocabulary=["a", "b"], invert=True), ("int64", (3,))),
    "padded frequencies": (
        lambda: vocabulary(layers.TextVectorization(8, output_mode="tf_idf", pad_to_max_tokens=True), WORDS),
        ("string", ()),
    ),
    "a given mean": (lambda: layers.Normalization(mean=2.0, variance=4.0), VECTOR),
    "an inverted normalization": (lambda: adapted(invert=True), VECTOR),
    "a function for an activation": (lambda: layers.Dense(3, activation=scaled), VECTOR),
    "a lambda for an activation": (lambda: layers.Dense(3, activation=lambda x: np.pi * x), VECTOR),
    "LoRA": (lora, VECTOR),
    "int8": (lambda: quantized("int8"), VECTOR),
    "float8": (lambda: quantized("float8"), VECTOR),
    "a stateful LSTM": (lambda: layers.LSTM(3, stateful=True), "batch of 2"),
    "renormalised": (lambda: layers.Dense(3, kernel_constraint="unit_norm", kernel_regularizer="l2"), VECTOR),
}
ALIASES = {name for name in dir(layers) if getattr(layers, name) in map(vars(layers).get, ARGUMENTS) and name not in ARGUMENTS}
EXCLUDED = {
    *("Layer", "InputLayer", "InputSpec", "Wrapper"),  # base classes, and parts of every model
    *("GRUCell", "LSTMCell", "SimpleRNNCell", "StackedRNNCells"),  # work only inside an RNN
    *("FlaxLayer", "JaxLayer", "TorchModuleWrapper"),  # need another library
    "TFSMLayer",  # reads a folder on disk: its configuration cannot rebuild it
    "MaxNumBoundingBoxes",  # takes labels, not images
    "Equalization",  # returns its symbolic input, which Keras cannot turn into a model
}


def randomised(model):
    """Moves all floating-point weights off their initial values; variances and other positive weights stay positive."""
    rng = np.random.default_rng(0)
    for weight in keyed_weights(model).values() if model.weights else ():
        if weight.variable.dtype == "float32":
            weight.variable.assign(np.abs(weight.variable.numpy() + 0.3 * rng.random(weight.variable.shape)))
    copies.finish(model._flatten_layers())
    return model


def around(make, shape):
    """Builds a model with one layer in the middle."""
    layer = make() if callable(make) else make
    if shape == "attention":
        inputs = keras.Input(SEQUENCE)
        takes_list = isinstance(layer, layers.Attention)
        return keras.Model(inputs, layer([inputs, inputs]) if takes_list else layer(inputs, inputs))
    if shape == "batch of 2":
        inputs = keras.Input(batch_shape=(2, *SEQUENCE))
        return keras.Model(inputs, layer(inputs))
    inputs = [
        keras.Input(s[1], dtype=s[0]) if s and isinstance(s[0], str) else keras.Input(s)
        for s in (shape if isinstance(shape, list) else [shape])
    ]
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], layer(inputs if len(inputs) > 1 else inputs[0]))


def maker(name):
    arguments, shape = ARGUMENTS[name]
    return (arguments if callable(arguments) else lambda: getattr(layers, name)(*arguments)), shape


def inputs_of(model, n=3, seed=1):
    """Returns random inputs of a model, other than those that a copy is compared on."""
    rng = np.random.default_rng(seed)

    def one(spec):
        shape = (spec.shape[0] or n, *(side or 8 for side in spec.shape[1:]))
        if spec.dtype == "string":
            return rng.choice(np.array(["cat", "dog", "cow", "b", "line\nend", "no such word"], object), shape)
        if "int" in spec.dtype:
            return rng.integers(0, 3, shape)
        return rng.uniform(0, 1, shape).astype("float32")

    return keras.tree.map_structure(one, model.inputs[0] if isinstance(model, keras.Sequential) else model.input)


def assert_equal(model, other, x, **options):
    for a, b in zip(*(keras.tree.flatten(m(x, **options)) for m in (model, other)), strict=True):
        assert_close(a, b)


def assert_close(a, b):
    a, b = keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b)
    if a.dtype.kind == "f":
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(a), initial=0))
    else:
        np.testing.assert_array_equal(a, b)


def flags(model):
    return [layer.trainable for layer in model._flatten_layers()], [v.trainable for v in model.variables]


def test_every_layer_of_keras_is_in_the_table_or_left_out_by_name():
    known = {name for name in dir(layers) if inspect.isclass(getattr(layers, name))} - ALIASES
    assert known == set(ARGUMENTS) | EXCLUDED
    assert not set(ARGUMENTS) & EXCLUDED


@pytest.mark.filterwarnings("error:The copy of the model")
@pytest.mark.parametrize("name", [*ARGUMENTS, *STATES])
def test_a_copy_of_every_layer_computes_the_same(name):
    make, shape = maker(name) if name in ARGUMENTS else STATES[name]
    model = randomised(around(make, shape))
    x = inputs_of(model)
    if name == "a stateful LSTM":
        model(x)
    copy = detached_copy(model)
    assert not {id(v) for v in model.variables} & {id(v) for v in copy.variables}
    assert not {id(layer) for layer in model._flatten_layers()} & {id(layer) for layer in copy._flatten_layers()}
    assert flags(model) == flags(copy)
    assert_equal(model, copy, x, training=False)
    if not copies._seeds(model) and name not in ("AugMix", "CutMix", "MixUp", "RandAugment"):
        assert_equal(model, copy, x, training=True)
    if model.weights:
        anchors = l2sp.Anchors.of(model)
        assign(copy, {key: np.zeros_like(value) for key, value in anchors.items()})
        anchors.restore(copy)
        assert_equal(model, copy, x, training=False)


class Scaled(layers.Layer):
    """A layer that derives a constant from its weight, or keeps one outside its weights, and may define how it is saved."""

    kept = factor = 1.0

    def build(self, shape):
        self.w = self.add_weight(shape=(), initializer="ones", name="w")

    def call(self, x):
        return x * self.factor * self.kept


class Derives(Scaled):
    kept = property(lambda self: 1.0, lambda self, value: None)

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.factor = float(self.w.numpy()) * 2


class Keeps(Scaled):
    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["kept"] = np.float32(self.kept)

    def load_own_variables(self, store):
        self.kept = float(store.pop("kept"))
        super().load_own_variables(store)


class Writes(Scaled):
    def save_assets(self, folder):
        with open(f"{folder}/kept.txt", "w") as file:
            file.write(str(self.kept))

    def load_assets(self, folder):
        with open(f"{folder}/kept.txt") as file:
            self.kept = float(file.read())


class Demands(Scaled):
    def __init__(self, scale, **kwargs):
        super().__init__(**kwargs)


@pytest.mark.parametrize("cls", [Derives, Keeps, Writes])
def test_state_that_custom_layers_save_is_carried(cls):
    layer = cls()
    layer.kept = 5.0
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layer, layers.Dense(2)])
    layer.w.assign(3.0)
    copies.finish([layer])
    x = inputs_of(model)
    copy = detached_copy(model)
    assert_equal(model, copy, x)
    assert (copy.layers[1].kept, copy.layers[1].factor) == (layer.kept, layer.factor)
    layer.w.assign(1.0)
    copies.finish([layer])
    l2sp.Anchors.of(copy).restore(model)
    assert_equal(model, copy, x)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Scaled(name="mine"), "The layer 'mine' of class Scaled computes something else in a copy"),
        (Demands(object(), name="needs"), "The layer 'needs' of class Demands cannot be made again from its configuration"),
    ],
)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_state_that_cannot_be_carried_is_refused_by_name(layer, words, depth):
    layer = type(layer)(*([object()] if isinstance(layer, Demands) else []), name=layer.name)
    layer.kept = 5.0
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layer, layers.Dense(2)])
    for _ in range(depth):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, model(inputs))
    with pytest.raises(l2sp.InputError, match=words):
        detached_copy(model)


def test_a_model_that_takes_no_made_up_input_is_copied_with_a_warning():
    class Fussy(layers.Layer):
        def call(self, x):
            if hasattr(x, "numpy") and np.abs(x.numpy()).max() < 100:
                raise ValueError("too small")
            return x

    model = keras.Sequential([keras.Input((4,)), Fussy(), layers.Dense(2)])
    with pytest.warns(UserWarning, match="could not be compared"):
        copy = detached_copy(model)
    assert_equal(model, copy, np.full((1, 4), 200.0))


def test_graphs_of_many_shapes_are_copied():
    a, b = keras.Input((4,), name="a"), keras.Input((None, 4), name="b")
    shared, base = layers.Dense(4, name="shared"), keras.Sequential([keras.Input((4,)), layers.Dense(4), adapted((4,))])
    outer = keras.Model((i := keras.Input((4,))), base(shared(i), training=False))  # `shared` is in two models
    x = outer(a) + base(a) + shared(keras.ops.mean(layers.LSTM(4, return_sequences=True)(b), axis=1))
    model = keras.Model({"a": a, "b": b}, {"one": layers.Dense(2)(x), "two": x[:, :2] * 2.0})
    randomised(model)
    copy = detached_copy(model)
    x = {"a": np.random.default_rng(0).random((2, 4)), "b": np.random.default_rng(1).random((2, 5, 4))}
    assert list(copy(x)) == ["one", "two"]
    assert_equal(model, copy, x)
    assert len(copy.weights) == len(model.weights) and list(keyed_weights(copy)) == list(keyed_weights(model))
    copy_outer = next(layer for layer in copy.layers if layer.name == outer.name)
    assert copy_outer.layers[-1]._inbound_nodes[0].arguments.kwargs["training"] is False


class Patches(layers.Layer):
    """A layer as in KerasHub's ViT: `get_config` names more than the constructor takes."""

    def __init__(self, width, factor=2.0, **kwargs):
        super().__init__(**kwargs)
        self.width, self.factor = width, factor
        self.inner = layers.Dense(width, activation=keras.activations.gelu, name="inner")

    def build(self, shape):
        self.inner.build(shape)
        self.token = self.add_weight(shape=(self.width,), initializer="normal", name="token")

    def call(self, x):
        return self.inner(x) * self.factor + self.token

    def get_config(self):
        return {**super().get_config(), "width": self.width, "number": 7}


@keras.saving.register_keras_serializable("tests")
class Backbone(keras.Model):
    """A functional model that makes its layers itself."""

    def __init__(self, width, **kwargs):
        inputs = keras.Input(VECTOR)
        x = layers.Dropout(0.5)(layers.Dense(width, name="first")(inputs))
        super().__init__(inputs, layers.LayerNormalization(name="norm")(Patches(width, name="patches")(x)), **kwargs)
        self.width = width

    def get_config(self):
        return {"name": self.name, "width": self.width}


def around_a_backbone():
    backbone = Backbone(4, name="backbone")
    model = keras.Model(backbone.input, layers.Dense(2, name="head")(backbone(backbone.input)))
    return backbone, randomised(model)


def test_a_model_that_makes_its_layers_itself_is_copied_as_a_whole(tmp_path):
    backbone, model = around_a_backbone()
    backbone.get_layer("first").trainable = False
    copy = detached_copy(model)
    x = inputs_of(model)
    assert_equal(model, copy, x)
    assert type(copy.get_layer("backbone")) is Backbone and list(keyed_weights(copy)) == list(keyed_weights(model))
    assert not {id(v) for v in model.variables} & {id(v) for v in copy.variables}
    assert [v.path for v in copy.trainable_variables] == [v.path for v in model.trainable_variables]
    l2sp.attach(model, l2sp.L2SP(0.1), l2sp.Anchors.of(model))
    assert not detached_copy(model).losses and model.losses
    new = l2sp.with_new_head(copy, 3)
    new.save(tmp_path / "m.keras")
    assert_equal(new, keras.models.load_model(tmp_path / "m.keras"), x)


def lora_inside(backbone):
    backbone.get_layer("first").enable_lora(2)


CHANGES = {
    "a number": lambda backbone: setattr(backbone.get_layer("patches"), "factor", 3.0),
    "a function": lambda backbone: setattr(backbone.get_layer("patches").inner, "activation", keras.activations.relu),
    "a rate": lambda backbone: setattr(backbone.layers[2], "rate", 0.1),  # no output of inference mode shows it
    "an epsilon": lambda backbone: setattr(backbone.get_layer("norm"), "epsilon", 0.5),
    "more weights": lora_inside,
    "another number of weights": lambda backbone: setattr(backbone, "width", 5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_whole_model_cannot_make_again_is_refused(change):
    backbone, model = around_a_backbone()
    detached_copy(model)
    CHANGES[change](backbone)
    with pytest.raises(l2sp.InputError, match="'patches' of class Patches cannot be made again from its configuration"):
        detached_copy(model)


def test_a_layer_inside_a_whole_model_is_shared_in_the_copy_too():
    backbone = Backbone(4, name="backbone")
    inputs = keras.Input(VECTOR)
    after = keras.Model(inputs, backbone(inputs) + backbone.get_layer("first")(inputs))
    copy = detached_copy(randomised(after))
    assert len(copy.weights) == len(after.weights)
    assert_equal(after, copy, inputs_of(after))
    before = keras.Model(inputs, backbone(keras.ops.pad(backbone.get_layer("first")(inputs), ((0, 0), (0, 1)))))
    with pytest.raises(l2sp.InputError, match="'patches' of class Patches"):  # `first` is copied before the backbone
        detached_copy(before)


def test_flags_are_those_of_the_original_on_every_level():
    base = keras.Sequential([keras.Input(SEQUENCE), frozen_inside_self(), layers.Dense(3), layers.Dense(2)])
    model = keras.Sequential([keras.Input(SEQUENCE), layers.Rescaling(2.0), base, layers.Dense(2)])
    for change in (lambda: None, freeze(base), freeze(base.layers[1]), unfreeze(base.layers[2]), freeze(model), unfreeze(base)):
        change()
        copy = detached_copy(model)
        assert flags(copy) == flags(model)
        assert [v.path for v in copy.trainable_variables] == [v.path for v in model.trainable_variables]


def frozen_inside_self():
    inputs = keras.Input(SEQUENCE)
    return keras.Model(inputs, frozen_inside()(inputs, inputs))


def freeze(layer):
    return lambda: setattr(layer, "trainable", False)


def unfreeze(layer):
    return lambda: setattr(layer, "trainable", True)


def test_a_copy_draws_its_own_numbers_and_comparing_changes_nothing():
    model = keras.Sequential([keras.Input((50,)), layers.BatchNormalization(), layers.Dropout(0.5)])
    before = [v.numpy() for v in model.variables]
    copy = detached_copy(model)
    for value, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(value, variable.numpy())
    x = np.random.default_rng(0).random((2, 50))
    assert not np.array_equal(model(x, training=True), copy(x, training=True))


def test_a_compiled_model_of_any_loss_is_copied():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.compile("adam", lambda y, z: keras.ops.mean(y - z))
    assert not detached_copy(model).compiled


def check_copies(model, folder):
    """Compares a model's outputs with those of a copy, and of a third model that gets its weights in each possible way."""
    x = inputs_of(model, n=2)
    expected = model(x, training=False)
    assert np.isfinite(expected).all() and np.std(expected) > 0  # else the test could not fail
    copy = detached_copy(model)
    assert flags(copy) == flags(model)
    anchors = l2sp.Anchors.of(model)
    other = l2sp.Anchors({key: a + np.ones((), a.dtype) for key, a in anchors.items()})
    l2sp.save_delta(model, other, folder / "d.safetensors")
    anchors.save(folder / "m.safetensors")
    ways = [lambda m: None]
    ways += [anchors.restore, lambda m: l2sp.load_delta(m, other, folder / "d.safetensors")]
    ways += [lambda m: keras_files.load_weights(m, folder / "m.safetensors")]
    fresh = type(model).from_config(model.get_config())
    for number, way in enumerate(ways):
        target = fresh if number else copy
        way(target)
        assert_close(expected, target(x, training=False))
        assign(fresh, {key: np.zeros_like(value) for key, value in anchors.items()})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_of_each_family_is_copied_and_restored(family, tmp_path):
    check_copies(network(family), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.ALL)
def test_every_network_is_copied_and_restored(name, tmp_path):
    check_copies(networks.trained(networks.ALL[name]()), tmp_path)


@pytest.mark.parametrize("family", [f if f == "EfficientNet" else pytest.param(f, marks=pytest.mark.slow) for f in MAKERS])
def test_a_network_on_devices_computes_the_same(family, mirrored):
    model = network(family)
    x = inputs_of(model, n=2)
    copy = devices.Devices(mirrored).replicated(model)
    assert_equal(model, copy, x, training=False)
    assert [v.trainable for v in copy.variables] == [v.trainable for v in model.variables]
    back = type(model).from_config(model.get_config())
    devices.copy_weights(copy, back)
    assert_equal(model, back, x, training=False)
    for one, two in zip(model.variables, copy.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())  # seeds included


def test_a_run_on_devices_takes_the_adapted_state_along(mirrored):
    model = keras.Sequential([keras.Input((5,)), adapted(), layers.Dense(3)])
    copy = devices.Devices(mirrored).replicated(model)
    x = inputs_of(model)
    assert_equal(model, copy, x)
    copy.layers[0].adapt_mean.assign(np.full(5, 7.0))
    devices.copy_weights(copy, model)
    np.testing.assert_allclose(np.ravel(model.layers[0].mean), 7)


def test_a_file_of_a_model_brings_its_vocabulary(tmp_path):
    def network(words):
        inputs = keras.Input((), dtype="string")
        x = vocabulary(layers.TextVectorization(output_sequence_length=3), words)(inputs)
        x = layers.Flatten()(layers.Embedding(6, 2, name="words")(x))
        return keras.Model(inputs, layers.Dense(2, name="head")(x))

    model, other = network(["cat dog", "cow"]), network(["no such", "word b"])
    model.save(tmp_path / "m.keras")
    keras_files.load_weights(other, tmp_path / "m.keras")
    assert_equal(model, other, np.array(["cat cow", "b dog"], object))
