"""Section 4.2's numbers and the schedule."""

import dataclasses

import keras
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.models.pixels import PixelFormat
from l2sp_tf.penalties.formulas import PENALTIES
from l2sp_tf.training.recipe import IMAGES


def test_the_defaults_are_the_papers():
    r = l2sp.Recipe.paper()
    assert (r.iterations, r.decay_step, r.momentum, r.batch_size, r.beta) == (9000, 6000, 0.9, 64, 0.01)
    assert (r.images.resize, r.images.crop, r.images.mirror, r.images.blur, r.params) == (256, 224, True, "gaussian", "all")
    assert r.learning_rate in (0.005, 0.01, 0.02)
    a = l2sp.Recipe.authors()
    assert (a.iterations, a.decay_step, a.params) == (9001, 5000, "kernels")
    assert (a.images.blur, a.images.resize_filter) == ("authors", "bilinear")
    assert (a.images.resize, a.images.resize_mode, a.images.crop, a.crops) == (256, "squash", 224, 1)


def test_how_a_source_model_is_tested_does_not_change_its_training():
    r = l2sp.Recipe()
    assert l2sp.Recipe.source(r.replace(crops=10)) == l2sp.Recipe.source(r)


@pytest.mark.parametrize(("iterations", "first_low"), [(9000, 6000), (3, 2), (200, 133), (1, 1)])
def test_the_rate_is_divided_by_ten_after_two_thirds(iterations, first_low):
    r = l2sp.Recipe(iterations=iterations)
    rates = [float(r.schedule()(step)) for step in (0, first_low - 1, first_low, first_low + 1)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])


def test_the_optimizer_is_sgd_with_momentum_and_no_decay_of_its_own():
    optimizer = l2sp.Recipe().optimizer()
    assert (optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == (0.9, False, None)


def test_records_leave_out_the_papers_kind_of_step():
    assert not {"solver", "penalty_step"} & set(l2sp.Recipe().record())
    said = l2sp.Recipe(solver="adam", penalty_step="decoupled")
    assert said.record()["solver"] == "adam" and said.record()["penalty_step"] == "decoupled"
    assert set(l2sp.Recipe.source(said).record()) == set(l2sp.Recipe.source(l2sp.Recipe()).record())


NAN, INF = float("nan"), float("inf")
BAD = {
    "iterations": (0, -1, 2.5, "9", True, None, NAN),
    "decay_at": (0, 1.5, False, "x"),
    "learning_rate": (0, -0.1, NAN, INF, "0.1", True, None),
    "momentum": (1.0, -0.1, NAN, "0.9", True),
    "batch_size": (0, 1.0, True),
    "alpha": (0.1, None, {"l3": 1.0}, {"l2": -1}, {"l2": NAN}, {"l2_sp": True}, {2: 1.0}),
    "beta": (-1, NAN, INF, "0.01", True, None, {"l3": 1.0}, {"l2": -1}, {"l2": NAN}, {"l2_sp": True}),
    "params": ("some", None, "Kernels"),
    "resize": (0, 256.0, True),
    "crop": (0, 300, True),
    "blur": ("box", None, True),
    "blur_kernel": (4, 0, 2.5, True),
    "blur_sigma": (1.0, (1.0,), (2.0, 1.0), (0.0, 1.0), (0.1, INF), ("a", "b"), "12"),
    "mirror": (1, "yes", None),
    "resize_mode": ("fit", None),
    "resize_filter": ("cubic", 0),
    "images": (None, 224, {"crop": 224}),
    "crops": (5, True, 1.0, "10"),
    "mean": ("target", ("1", "2"), (1, 2, NAN), 3),
    "log_every": (0, 1.5, True),
    "solver": ("sgdw", None),
    "penalty_step": ("none", None),
    "head_bias": (NAN, INF, "0", True, None),
    "smoothing": (-1e-9, NAN, True, None),
    "moving_statistics": ("old", None),
    "batch_norm_decay": (1.0, -0.1, NAN, True),
    "batch_norm": ("moving", None),
    "head_steps": (-1, 1.5, True, None),
    "head_learning_rate": (0, NAN, True, None),
    "label_smoothing": (-0.1, 1.0, NAN, True, None),
}


def test_every_field_is_checked():
    assert {field.name for field in dataclasses.fields(l2sp.Recipe)} | set(IMAGES) == set(BAD)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_values_are_refused(name, value):
    with pytest.raises(l2sp.InputError, match=f"{name}( of l2(_sp)?)? is") as found:
        l2sp.Recipe().replace(**{name: value})
    assert str(found.value).count("\n") == 0


def test_every_penalty_has_a_grid():
    assert all(len(l2sp.Recipe().grid_for(symbol)) > 2 for symbol in PENALTIES)


def test_a_misspelt_choice_gets_the_nearest_one():
    with pytest.raises(l2sp.InputError, match="Did you mean gaussian"):
        l2sp.Recipe().replace(blur="gausian")


def test_numbers_of_numpy_are_kept_as_plain_ones():
    r = l2sp.Recipe(iterations=np.int64(5), beta=np.float64(0.5), alpha={"l2": np.float64(2)})
    r = r.replace(blur_sigma=[1, np.float64(2)])
    assert r == l2sp.Recipe().replace(iterations=5, beta=0.5, alpha={"l2": 2.0}, blur_sigma=(1, 2.0))
    assert {type(value) for value in (r.iterations, r.beta, r.alpha["l2"], *r.images.blur_sigma)} == {int, float}


def test_unpublished_strengths_must_be_given():
    assert l2sp.Recipe().alpha_for("l2_sp") == 0.1
    with pytest.raises(l2sp.InputError, match="no published strength for the penalty l1_sp"):
        l2sp.Recipe().alpha_for("l1_sp")


def test_the_mean_follows_the_protocol():
    carried = PixelFormat(mean=(1, 2, 3))
    assert l2sp.Recipe.paper().mean_for("caltech256", carried) is None
    authors = l2sp.Recipe.authors()
    for name in ("caltech256", "caltech256/60", "tfds:caltech256"):
        assert authors.mean_for(name, carried) == (140.48, 135.94, 127.61)
    assert authors.mean_for("imagenet2012", carried) == (123.68, 116.78, 103.94)
    assert authors.mean_for("my/images", carried) is None
    assert l2sp.Recipe(mean="weights").mean_for("x", carried) == (1, 2, 3)
    assert l2sp.Recipe(mean=("4", 5, 6)).mean_for("imagenet2012", carried) == (4, 5, 6)
    with pytest.raises(l2sp.InputError, match="the weights carry no mean"):
        l2sp.Recipe(mean="weights").mean_for("x", PixelFormat())


def network(side=None, statistics=True, width=None):
    layer = keras.layers.BatchNormalization() if statistics else keras.layers.Activation("relu")
    shape = (side, side if width is None else width, 3)
    stack = [keras.Input(shape), keras.layers.Conv2D(2, 1), layer, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)]
    return keras.Sequential(stack, name="net")


@pytest.mark.parametrize(("images", "iterations"), [(20, 200), (640, 200), (641, 201), (5_000, 1563), (100_000, 9000)])
def test_a_network_is_trained_for_ten_epochs_within_limits(images, iterations):
    assert l2sp.Recipe.for_network(network(), images, say=[].append).iterations == iterations


@pytest.mark.parametrize(
    ("side", "resize", "blur"),
    [(224, 256, (5, 0.1, 2.0)), (128, 146, (3, 0.05714, 1.143)), (448, 512, (9, 0.2, 4.0)), (64, 73, None)],
)
def test_images_of_a_network_are_the_papers_in_proportion(side, resize, blur):
    for given in ({"model": network(side)}, {"model": network(), "image_size": side}):
        made = l2sp.Recipe.for_network(images=50, say=[].append, **given).images
        assert (made.crop, made.resize) == (side, resize)
        assert blur is None if made.blur == "none" else (made.blur_kernel, *made.blur_sigma) == blur
    assert l2sp.Recipe.for_network(network(224), 50, say=[].append).images == l2sp.Recipe().images


def test_a_network_keeps_statistics_if_it_has_some_and_says_what_was_chosen():
    said = []
    kept = l2sp.Recipe.for_network(network(128), 600, say=said.append)
    assert (kept.batch_norm, kept.head_steps, kept.learning_rate, kept.batch_size) == ("source", 100, 0.001, 32)
    assert kept == l2sp.Recipe.for_network(network(128, statistics=False), 600, say=said.append).replace(batch_norm="source")
    assert said == [
        "net, 600 training images: crops of 128 pixels from 146, blurred by a kernel of 3; 100 steps for the head alone, then "
        f"200 at the rate 0.001, 32 images each{end}."
        for end in (", batch norm keeps the source's statistics", "")
    ]


def test_a_network_of_other_images_is_refused():
    for model, size, message in (
        (network(32), 64, "image_size is 64, but net takes images of 32 pixels: leave it out."),
        (network(32, width=48), None, "net takes images of 32x48 pixels, but crops are square"),
    ):
        with pytest.raises(l2sp.InputError, match=message):
            l2sp.Recipe.for_network(model, 10, image_size=size)
    with pytest.raises(l2sp.InputError, match="images is 0"):
        l2sp.Recipe.for_network(network(), 0)


def test_cross_validation_tries_the_papers_rates_or_those_around_the_recipes():
    for rate in (0.005, 0.01, 0.02):
        assert l2sp.Recipe(learning_rate=rate).rates() == (0.005, 0.01, 0.02)
    assert l2sp.Recipe(learning_rate=0.001).rates() == (0.0003, 0.001, 0.003)
    assert l2sp.Recipe(learning_rate=0.05).rates() == (0.02, 0.05, 0.2)
