"""Checks the image operations against naive loops, eagerly and inside tf.data."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from reference import images as reference

from l2sp_tf.data import images as ops
from l2sp_tf.files.errors import InputError

OPERATIONS = {
    "resize": lambda image, seed: ops.resize(image, 5),
    "resize_shorter_side": lambda image, seed: ops.resize(image, 5, "shorter_side"),
    "resize_bilinear": lambda image, seed: ops.resize(image, 5, filter="bilinear"),
    "to_three_channels": lambda image, seed: ops.to_three_channels(image),
    "random_blur": lambda image, seed: ops.random_blur(image, seed),
    "random_distortion": lambda image, seed: ops.random_distortion(image, seed),
    "random_mirror": lambda image, seed: ops.random_mirror(image, seed),
    "random_crop": lambda image, seed: ops.random_crop(image, 6, seed),
    "central_crop": lambda image, seed: ops.central_crop(image, 6),
}
SEEDS = np.stack([np.full(64, 7), np.arange(64)], axis=1)


def photo(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32)


@functools.cache
def sigma_drawn(seed, low, high):
    """Reads the sigma that random_blur used off the response to one bright pixel."""
    spot = np.zeros((9, 9, 1), np.float32)
    spot[4, 4] = 1
    response = ops.random_blur(spot, seed, sigma=(low, high)).numpy()[:, :, 0].sum(axis=0)
    return np.sqrt(0.5 / np.log(response[4] / response[5]))


@pytest.mark.parametrize("name", OPERATIONS)
def test_agrees_inside_tf_data(name):
    batch, operation = photo(8, 9, 8, 3), OPERATIONS[name]
    eager = np.stack([operation(image, seed) for image, seed in zip(batch, SEEDS, strict=False)])
    streamed = tf.data.Dataset.from_tensor_slices((batch, SEEDS[:8])).map(operation)
    np.testing.assert_array_equal(list(streamed.as_numpy_iterator()), eager)


@pytest.mark.parametrize("name", OPERATIONS)
def test_agrees_inside_tf_data_where_the_sides_are_unknown(name):
    images, operation = [photo(9, 8, 3), photo(7, 12, 3, seed=1)], OPERATIONS[name]
    spec = tf.TensorSpec([None, None, 3], tf.float32)
    streamed = tf.data.Dataset.from_generator(lambda: iter(images), output_signature=spec).map(lambda x: operation(x, SEEDS[1]))
    for image, result in zip(images, streamed.as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(result, operation(image, SEEDS[1]))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_batch_agrees_with_its_images(name):
    batch, operation = photo(8, 9, 8, 3), OPERATIONS[name]
    alone = np.stack([operation(image, seed) for image, seed in zip(batch, SEEDS, strict=False)])
    np.testing.assert_allclose(operation(batch, SEEDS[:8]), alone, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 7, 3), (4, 5, 1), (4, 17, 3), (11, 5, 3), (6, 6, 3)])
def test_resize_matches_the_naive_sum(shape):
    image = photo(*shape)
    resized = ops.resize(image.astype(np.uint8), 6)
    assert resized.dtype == tf.uint8
    assert np.abs(resized.numpy() - reference.resize(image, 6, 6)).max() <= 0.501


@pytest.mark.parametrize(("height", "width", "sides"), [(12, 7, (10, 6)), (5, 11, (6, 13)), (6, 6, (6, 6)), (9, 40, (6, 26))])
def test_resize_of_the_shorter_side_keeps_the_aspect(height, width, sides):
    image = photo(height, width, 3)
    resized = ops.resize(image.astype(np.uint8), 6, "shorter_side")
    assert resized.shape == (*sides, 3)
    assert np.abs(resized.numpy() - reference.resize(image, *sides)).max() <= 0.501
    with pytest.raises(InputError, match="resize_mode is 'stretch'"):
        ops.resize(image, 6, "stretch")


@pytest.mark.parametrize("shape", [(12, 7, 3), (4, 5, 1), (4, 17, 3), (11, 5, 3), (6, 6, 3)])
def test_the_authors_filter_is_that_of_tensorflow_1(shape):
    image = photo(*shape)
    resized = ops.resize(image.astype(np.uint8), 6, filter="bilinear")
    assert np.abs(resized.numpy() - reference.resize_as_in_tensorflow_1(image, 6, 6)).max() <= 0.501
    with pytest.raises(InputError, match="resize_filter is 'cubic'"):
        ops.resize(image, 6, filter="cubic")


def test_resize_to_the_same_size_changes_nothing():
    image = photo(6, 6, 3).astype(np.uint8)
    np.testing.assert_array_equal(ops.resize(image, 6), image)


def test_resize_does_not_alias():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 255
    shrunk = ops.resize(stripes, 8).numpy()[1:-1]  # inside the border
    assert abs(shrunk.astype(int) - 127.5).max() < 3


def test_grey_is_repeated():
    grey = photo(4, 5, 1)
    np.testing.assert_array_equal(ops.to_three_channels(grey), np.concatenate([grey] * 3, axis=-1))
    with pytest.raises(InputError, match="4 channels"):
        ops.to_three_channels(photo(4, 5, 4))


@pytest.mark.parametrize("shape", [(9, 8, 3), (3, 3, 3), (2, 5, 1), (1, 1, 3), (1, 4, 3)])
@pytest.mark.parametrize("kernel_size", [1, 5, 7])
def test_blur_matches_the_naive_window(shape, kernel_size):
    image, sigma = photo(*shape), 1.3
    blurred = ops.random_blur(image, [1, 2], kernel_size, (sigma, sigma))
    np.testing.assert_allclose(blurred, reference.blur(image, sigma, kernel_size), rtol=1e-5, atol=1e-3)


def test_blur_of_a_batch_uses_each_images_own_sigma():
    batch = photo(4, 9, 8, 3)
    blurred = ops.random_blur(batch, SEEDS[:4])
    for image, result, seed in zip(batch, blurred, SEEDS, strict=False):
        expected = reference.blur(image, sigma_drawn(tuple(seed), 0.1, 2.0), 5)
        np.testing.assert_allclose(result, expected, rtol=1e-3, atol=0.2)


def test_sigma_is_uniform_over_its_range():
    # 64 draws from U(0.5, 2): the mean lies within 4 standard errors
    sigmas = np.array([sigma_drawn(tuple(seed), 0.5, 2.0) for seed in SEEDS])
    assert sigmas.min() >= 0.499 and sigmas.max() <= 2.001
    assert abs(sigmas.mean() - 1.25) < 4 * 1.5 / np.sqrt(12 * 64)


def test_blur_commutes_with_subtracting_the_mean():
    image, mean = photo(9, 8, 3), np.array([120.0, 110.0, 100.0], np.float32)
    before, after = ops.random_blur(image - mean, SEEDS[3]), ops.random_blur(image, SEEDS[3]) - mean
    np.testing.assert_allclose(before, after, atol=1e-3)


def test_draws_are_those_of_the_hash():
    seeds = np.array([[0, 0], [7, 2**33 + 5], [2**61, 3], [1, 2**62]])
    expected = [[reference.splitmix(*map(int, seed), draw) for draw in (1, 2, 3)] for seed in seeds]
    np.testing.assert_array_equal(ops._uniform(tf.constant(seeds), 3), expected)


def test_draws_are_uniform_and_those_of_neighbouring_keys_independent():
    # seeds as in the pipeline: seed and operation, epoch and index
    def drawn(first, epoch, count=1):
        indices = np.arange(20_000)
        return ops._uniform(tf.constant(np.stack([np.full_like(indices, first), epoch * 2**32 + indices], axis=1)), count).numpy()

    u = drawn(0, 0, 2)
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        counts = np.histogram(column, bins=100, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * np.sqrt(2 * 99)  # chi2 with 99 dof
    # next index, next draw, next operation, next epoch, next seed; and whole pairs on a grid of 10 x 10
    neighbours = [u[1:, 0], u[:, 1], drawn(1, 0)[:, 0], drawn(0, 1)[:, 0], drawn(4, 0)[:, 0]]
    for other in neighbours:
        one = u[: len(other), 0]
        z = np.corrcoef(one, other)[0, 1] * np.sqrt(len(one))
        assert abs(z) < 4.5
        counts, expected = np.histogram2d(one, other, bins=10, range=[[0, 1]] * 2)[0], len(one) / 100
        assert ((counts - expected) ** 2 / expected).sum() < 99 + 5 * np.sqrt(2 * 99)


def distortions(seeds):
    """Returns the brightness, saturation and contrast that the seeds [b, 2] draw."""
    u = ops._uniform(tf.constant(seeds), 3).numpy().astype(np.float64)
    return np.stack([(2 * u[:, 0] - 1) * 63 / 255, 0.5 + u[:, 1], 0.2 + 1.6 * u[:, 2]], axis=1)


@pytest.mark.parametrize("dark", [False, True])
def test_distortion_matches_the_loop_and_tensorflow(dark):
    batch = photo(16, 5, 4, 3)
    if dark:  # brightness takes such pixels below 0
        batch = np.minimum(batch, 1) * np.float32([0, 1, 0.1])
    batch[:, 0, 0], batch[:, 0, 1] = 0, 77  # black and grey
    distorted = ops.random_distortion(batch, SEEDS[:16]).numpy()
    for image, result, (brightness, saturation, contrast) in zip(batch, distorted, distortions(SEEDS[:16]), strict=True):
        np.testing.assert_allclose(result, reference.distort(image, brightness, saturation, contrast), rtol=1e-4, atol=2e-3)
        theirs = tf.image.adjust_saturation(tf.image.adjust_brightness(image, brightness), saturation)
        np.testing.assert_allclose(result, tf.image.adjust_contrast(theirs, contrast), rtol=1e-4, atol=2e-3)


def test_distortion_draws_from_the_authors_ranges():
    factors = distortions(np.stack([np.full(1000, 3), np.arange(1000)], axis=1))
    for drawn, low, high in zip(factors.T, (-63 / 255, 0.5, 0.2), (63 / 255, 1.5, 1.8), strict=True):
        assert low <= drawn.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < drawn.max() <= high


def test_mirror_takes_half():
    batch = np.arange(2000 * 6, dtype=np.float32).reshape(2000, 2, 3, 1)  # each image differs from its mirror image
    mirrored = ops.random_mirror(batch, np.stack([np.full(2000, 7), np.arange(2000)], axis=1)).numpy()
    turned = [np.array_equal(result, image[:, ::-1]) for result, image in zip(mirrored, batch, strict=True)]
    same = [np.array_equal(result, image) for result, image in zip(mirrored, batch, strict=True)]
    assert sum(turned) + sum(same) == 2000
    assert abs(sum(turned) - 1000) < 4 * np.sqrt(2000 / 4)  # 4 standard deviations of B(2000, 1/2)


def test_random_crop_reaches_every_window_and_no_other():
    image = photo(6, 7, 1)
    found = reference.windows(image, 5)
    seeds = np.stack([np.full(200, 3), np.arange(200)], axis=1)
    counts = dict.fromkeys(found, 0)
    for cropped in ops.random_crop(np.repeat(image[None], 200, axis=0), 5, seeds).numpy():
        counts[next(place for place, window in found.items() if np.array_equal(window, cropped))] += 1
    expected = 200 / len(found)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 20.5  # chi2 with 5 dof at 0.001


@pytest.mark.parametrize(("height", "width", "top", "left"), [(9, 8, 1, 1), (6, 7, 0, 0), (11, 6, 2, 0)])
def test_central_crop_starts_at_the_floor(height, width, top, left):
    image = photo(height, width, 3)
    np.testing.assert_array_equal(ops.central_crop(image, 6), image[top : top + 6, left : left + 6])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crops_and_mirror_keep_the_dtype(dtype):
    image = photo(8, 8, 3).astype(dtype)
    for name in ("random_mirror", "random_crop", "central_crop"):
        assert OPERATIONS[name](image, SEEDS[0]).dtype == dtype


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_equal_seeds_draw_equally_and_others_differ(dtype):
    image = photo(9, 9, 3)
    for operation in (OPERATIONS["random_blur"], lambda x, s: ops.random_crop(x, 3, s)):
        results = [operation(image, np.array([5, i], dtype)).numpy() for i in (1, 1, 2)]
        np.testing.assert_array_equal(results[0], results[1])
        assert not np.array_equal(results[0], results[2])


def test_a_crop_that_does_not_fit_is_named():
    for crop in (lambda: ops.central_crop(photo(9, 8, 3), 9), lambda: ops.random_crop(photo(9, 8, 3), 9, SEEDS[0])):
        with pytest.raises(InputError, match="9x9 does not fit in an image of 9x8"):
            crop()


def test_a_crop_that_does_not_fit_an_image_of_unknown_sides_fails():
    crop = tf.function(lambda x: ops.central_crop(x, 9), input_signature=[tf.TensorSpec([None, None, 3])])
    with pytest.raises(tf.errors.InvalidArgumentError, match="larger than its image"):
        crop(photo(9, 8, 3))


@pytest.mark.parametrize(("kernel_size", "sigma"), [(4, (0.1, 2)), (0, (0.1, 2)), (5, (0, 2)), (5, (2, 1)), (5, (1,))])
def test_a_blur_that_makes_no_sense_is_refused(kernel_size, sigma):
    with pytest.raises(InputError, match="blur"):
        ops.random_blur(photo(9, 8, 3), [1, 2], kernel_size, sigma)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_inside_of_a_blur_needs_no_more_than_its_margin(dtype):
    batch, mean = photo(3, 9, 10, 3).astype(dtype), np.array([1.0, 2.0, 3.0], np.float32)
    inside = ops.blur_inside(batch[:, 1:9, 2:10], tf.constant(SEEDS[:3]), mean=mean)
    np.testing.assert_allclose(inside, ops.random_blur(batch, SEEDS[:3])[:, 3:7, 4:8] - mean, rtol=1e-5, atol=1e-3)
