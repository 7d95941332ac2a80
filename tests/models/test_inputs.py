"""A network that cannot be fed with batches of images is refused by name, before anything is trained."""

import keras
import pytest
from keras import layers

import l2sp_tf as l2sp
from l2sp_tf.data.datasets import load_dataset
from l2sp_tf.experiments.configuration import plans_of
from l2sp_tf.experiments.starts import outline
from l2sp_tf.models import zoo

SHAPE = (8, 8, 3)


def of(*inputs, outputs=1):
    pooled = [layers.GlobalAveragePooling2D()(x) if len(x.shape) == 4 else x for x in inputs]
    x = layers.Concatenate()(pooled) if len(pooled) > 1 else pooled[0]
    heads = [layers.Dense(10)(x) for _ in range(outputs)]
    return keras.Model(list(inputs) if len(inputs) > 1 else inputs[0], heads if outputs > 1 else heads[0], name="mine")


# networks that are refused, and what is said of them
WRONG = {
    "two inputs": (lambda: of(keras.Input(SHAPE), keras.Input(SHAPE)), "'mine' takes 2 inputs, but an image is one"),
    "a vector": (lambda: of(keras.Input((8,))), r"'mine' takes inputs of shape \(None, 8\), not batches of images"),
    "a fixed batch": (lambda: of(keras.Input(SHAPE, batch_size=2)), "'mine' takes batches of 2 images alone"),
    "bytes": (
        lambda: of(keras.Input(SHAPE, dtype="uint8")),
        "'mine' takes pixels as uint8, to which prepared images would be cut",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_networks_that_do_not_take_images_are_refused(kind, tmp_path):
    make, words = WRONG[kind]
    with pytest.raises(l2sp.InputError, match=words):
        l2sp.finetune(make(), load_dataset("digits/target"), l2sp.L2SP(0.1))
    with pytest.raises(l2sp.InputError, match=words):
        outline(plan_of(make(), tmp_path), say=lambda line: None)


def plan_of(model, folder):
    model.save(folder / "m.keras")
    values = {"target": ["digits/target"], "weights": [str(folder / "m.keras")], "pixels": "rgb", "seeds": [0]}
    return plans_of({**values, "workdir": str(folder / "w")})[0]


def test_a_source_needs_one_head(tmp_path):
    with pytest.raises(l2sp.InputError, match="The model 'mine' has 2 outputs: give a model of one"):
        outline(plan_of(of(keras.Input(SHAPE), outputs=2), tmp_path), say=lambda line: None)
    body = keras.Model(x := keras.Input(SHAPE), layers.GlobalAveragePooling2D()(layers.Conv2D(10, 3)(x)))
    with pytest.raises(l2sp.InputError, match="has no head, so that it cannot classify the images of digits/source"):
        outline(plan_of(body, tmp_path), say=lambda line: None)


@pytest.mark.parametrize(("sides", "side"), [((None, 8), 8), ((8, None), 8), ((None, None), None), ((8, 8), 8), ((8, 9), "8x9")])
def test_the_side_of_a_file_is_the_one_that_it_fixes(sides, side, tmp_path):
    of(keras.Input((*sides, 3))).save(tmp_path / "m.keras")
    if isinstance(side, str):
        with pytest.raises(l2sp.InputError, match=f"takes images of {side} pixels, but crops are square"):
            zoo.side_of(str(tmp_path / "m.keras"))
    else:
        assert zoo.side_of(str(tmp_path / "m.keras")) == side
