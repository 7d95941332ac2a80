"""Files that version 0.1.0 wrote before the modules moved (tests/formats) still load, with the same content."""

import pathlib

import keras
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.experiments import records
from l2sp_tf.models import keras_files

FORMATS = pathlib.Path(__file__).parents[1] / "formats"
IMAGES, OUTPUTS = (np.load(FORMATS / f"{name}.npy") for name in ("images", "outputs"))
DIGESTS = {
    "anchors": "c31d5074a1332601a0edd5faff60bc039c61cad3802c0cb21c6fb6a8e921ec06",
    "fisher": "2e74b89d66d4451a9444833af9c84fd6c82f994043270818849ae46e3d15504b",
}


def model():
    """The network of the files, with other weights."""
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(2, 3, name="conv1_conv")(inputs)
    x = keras.layers.BatchNormalization(name="conv1_bn")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="predictions")(x))


@pytest.fixture(scope="module")
def anchors():
    return l2sp.Anchors.load(FORMATS / "anchors.safetensors")


def test_anchors_and_the_fisher_diagonal_have_the_digests_that_they_had(anchors):
    assert anchors.digest == DIGESTS["anchors"] and anchors.metadata["provenance"] == {"origin": "made"}
    assert str(keras_files.stored_pixels(FORMATS / "anchors.safetensors")).startswith("rgb, scale 0.01712/")
    assert l2sp.Fisher.load(FORMATS / "fisher.safetensors").digest == DIGESTS["fisher"]


def test_weights_restore_their_network():
    made = model()
    keras_files.load_weights(made, FORMATS / "anchors.safetensors")
    np.testing.assert_allclose(made.predict(IMAGES, verbose=0), OUTPUTS, rtol=1e-5)


def test_a_delta_is_added_to_its_anchors(anchors):
    made = model()
    l2sp.load_delta(made, anchors, FORMATS / "delta.safetensors")
    np.testing.assert_array_equal(made.get_layer("predictions").kernel, anchors["predictions/kernel"] + 1)
    np.testing.assert_array_equal(made.get_layer("conv1_conv").kernel, anchors["conv1_conv/kernel"])


def test_a_model_that_carries_penalties_trains_on_once_they_are_bound(anchors):
    found = keras.models.load_model(FORMATS / "attached.keras")
    np.testing.assert_allclose(found.predict(IMAGES, verbose=0), OUTPUTS, rtol=1e-5)
    assert isinstance(found.optimizer, l2sp.Proximal) and repr(found.get_layer("conv1_conv").kernel.regularizer).startswith(
        "GroupL"
    )
    l2sp.attach(found, l2sp.GroupLassoSP(0.3), anchors)
    found.compile(l2sp.Proximal.of(found.optimizer, found), "mse")
    found.fit(IMAGES, OUTPUTS, verbose=0)


@pytest.mark.parametrize("name", ["run", "selection"])
def test_records_are_read(name):
    record = records.read_record(FORMATS / f"{name}.json")
    assert records.question(record["settings"] if name == "run" else record["question"])["target"] == "digits/target"
