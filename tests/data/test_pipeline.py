"""The pipeline: decodes once, names bad images, and streams that resume to the bit."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from reference import images as reference

from l2sp_tf.data import images as ops, pipeline
from l2sp_tf.data.datasets import load_dataset
from l2sp_tf.data.decoding import Images, decode
from l2sp_tf.data.pipeline import Preprocessing, channel_mean, test_batches, training_batches
from l2sp_tf.data.sets import Dataset, Split
from l2sp_tf.files.errors import InputError
from l2sp_tf.models.pixels import PIXELS, PixelFormat

MEAN = np.array([120.0, 110.0, 100.0], np.float32)


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def huge_png():
    """A PNG whose header declares 20,000 x 20,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    png = encoded(picture(4, 4, 3), "PNG")
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def huge_jpeg():
    jpeg = encoded(picture(8, 8, 3), "JPEG")
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", 20_000, 20_000) + jpeg[place + 4 :]


BAD = {
    "empty.jpg": b"",
    "text.jpg": b"this is no image",
    "half.jpg": encoded(picture(40, 40, 3), "JPEG")[:400],
    "end.jpg": encoded(picture(40, 40, 3), "JPEG")[:-2],
    "half.png": encoded(picture(40, 40, 3), "PNG")[:1000],
    "short.png": encoded(picture(4, 4, 3), "PNG")[:20],
    "tiff.png": encoded(picture(4, 4, 3), "TIFF"),
    "huge.png": huge_png(),
    "huge.jpg": huge_jpeg(),
}


def split_of(folder, contents, labels=None):
    """A split of files with the given bytes, in the given order."""
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    labels = np.zeros(len(contents)) if labels is None else labels
    files = tuple(folder / name for name in contents)
    return Split(tuple(map(str, files)), np.asarray(labels, np.int32), files=files)


def good_and_bad(folder, count=150):
    """Writes good images of distinct colours with all the bad ones between them; returns the positions of the bad ones too."""
    contents, places = {}, {}
    for i, (name, content) in enumerate(BAD.items()):
        places[int(i * (count - 1) / (len(BAD) - 1))] = (name, content)
    for i in range(count):
        name, content = places.get(i, (f"{i}.png", encoded(np.full((5, 4, 3), i, np.uint8), "PNG")))
        contents[name] = content
    return split_of(folder, contents, np.arange(count) % 2), sorted(places)


def some_images(count=10, size=6, seed=0):
    return Images(picture(count, size, size, 3, seed=seed), np.arange(count, dtype=np.int32))


def collect(dataset):
    x, labels = zip(*dataset.as_numpy_iterator(), strict=True)
    return list(x), list(labels)


def test_decode_matches_pillow_and_the_naive_resize(tmp_path):
    colour, grey = picture(12, 9, 3), picture(7, 8, seed=1)
    palette = Image.fromarray(colour).convert("P")
    contents = {
        "a.png": encoded(colour, "PNG"),
        "b.png": encoded(grey, "PNG"),
        "c.jpg": encoded(colour, "JPEG", quality=95),
        "d.jpg": encoded(grey, "JPEG", quality=95),
        "e.jpg": encoded(colour, "PNG"),  # the bytes decide, not the name
        "f.png": encoded(np.dstack([colour, picture(12, 9, seed=2)]), "PNG"),
        "g.png": encoded(palette, "PNG"),
    }
    images = decode(split_of(tmp_path, contents, range(7)), 6)
    assert images.pixels.shape == (7, 6, 6, 3) and images.pixels.dtype == np.uint8
    assert images.labels.tolist() == list(range(7)) and images.labels.dtype == np.int32 and images.skipped == ()
    grey = np.repeat(grey[..., None], 3, axis=-1)
    # JPEG decoders differ in how exact their cosine transform is, most on noise, and in how they interpolate colour
    grey_jpeg = np.array(Image.open(tmp_path / "d.jpg").convert("RGB"))
    alpha = picture(12, 9, 1, seed=2) / 255
    on_white = np.round(alpha * colour + (1 - alpha) * 255).astype(np.uint8)
    expected = [colour, grey, None, grey_jpeg, colour, on_white, np.array(palette.convert("RGB"))]
    for result, original, tolerance in zip(images.pixels, expected, [0.51, 0.51, 0, 5, 0.51, 0.51, 0.51], strict=True):
        if original is not None:
            assert np.abs(result - reference.resize(original, 6, 6)).max() <= tolerance
    raw = tf.io.decode_jpeg(contents["c.jpg"], channels=3).numpy()
    assert np.abs(images.pixels[2] - reference.resize(raw, 6, 6)).max() <= 0.51


def test_decode_of_arrays():
    split = load_dataset("digits/target").test
    images = decode(split, 8)
    assert images.pixels.shape == (547, 8, 8, 3)
    np.testing.assert_array_equal(images.pixels, np.repeat(split.pixels, 3, axis=-1))
    np.testing.assert_array_equal(images.labels, split.labels)


@pytest.mark.parametrize("name", BAD)
def test_each_bad_image_is_named(tmp_path, name):
    split = split_of(tmp_path, {"good.png": encoded(picture(5, 5, 3), "PNG"), name: BAD[name]})
    with pytest.raises(InputError, match="1 of 2 images cannot be decoded") as error:
        decode(split, 4)
    assert str(tmp_path / name) in str(error.value) and "--skip_bad_images" in str(error.value)


@pytest.mark.parametrize("length", [8, 15, 16, 20, 23, 24])
def test_a_png_cut_off_within_its_header_is_named(tmp_path, length):
    good = encoded(picture(5, 5, 3), "PNG")
    split = split_of(tmp_path, {"good.png": good, "cut.png": good[:length]})
    with pytest.raises(InputError, match=r"1 of 2 images cannot be decoded: .*cut.png \(truncated or damaged\)"):
        decode(split, 4)


def test_many_bad_images_are_counted_and_three_named(tmp_path):
    split, bad = good_and_bad(tmp_path)
    with pytest.raises(InputError, match="9 of 150 images cannot be decoded: .*; and 6 more") as error:
        decode(split, 4)
    assert [split.names[i] in str(error.value) for i in bad] == [True] * 3 + [False] * 6


@pytest.mark.parametrize("limit", [2**31, 0], ids=["memory", "file"])
def test_bad_images_are_left_out_in_order(tmp_path, limit):
    split, bad = good_and_bad(tmp_path)
    images = decode(split, 4, skip_bad_images=True, memory_limit_bytes=limit, cache_dir=tmp_path / "cache")
    kept = [i for i in range(len(split)) if i not in bad]
    assert images.skipped == tuple(split.names[i] for i in bad)
    assert len(images) == len(kept)
    expected = np.array(kept, np.uint8)[:, None, None, None] * np.ones((4, 4, 3), np.uint8)
    np.testing.assert_array_equal([images[i] for i in range(len(kept))], expected)
    np.testing.assert_array_equal(images.labels, split.labels[kept])


def test_a_class_without_an_image_left_is_refused(tmp_path):
    contents = {"a.png": encoded(picture(5, 5, 3), "PNG"), "b.jpg": b""}
    with pytest.raises(InputError, match="1 classes have no image .*b.jpg"):
        decode(split_of(tmp_path, contents, [0, 1]), 4, skip_bad_images=True)


def test_a_missing_file_is_not_a_bad_image(tmp_path):
    split = split_of(tmp_path, {"a.png": encoded(picture(5, 5, 3), "PNG")})
    split.files[0].unlink()
    with pytest.raises(FileNotFoundError, match="a.png"):
        decode(split, 4, skip_bad_images=True)


def test_a_large_result_lies_in_a_file(tmp_path):
    split = load_dataset("digits/target").train
    mapped = decode(split, 8, memory_limit_bytes=1000, cache_dir=tmp_path)
    assert isinstance(mapped.pixels, np.memmap)
    np.testing.assert_array_equal([mapped[i] for i in range(150)], decode(split, 8).pixels)
    assert [path.stat().st_size for path in tmp_path.glob("*.uint8")] == [len(set(split.keys)) * 8 * 8 * 3]


SHAPES = [(12, 9), (7, 20), (8, 8), (30, 6), (10, 11)]


@pytest.mark.parametrize("limit", [2**31, 1206, 1205, 0], ids=["memory", "just", "not quite", "file"])
def test_decode_keeps_the_aspect(tmp_path, limit):
    contents = {f"{i}.png": encoded(picture(*shape, 3, seed=i), "PNG") for i, shape in enumerate(SHAPES)}
    split = split_of(tmp_path, {**contents, "bad.png": b""})
    options = {"mode": "shorter_side", "skip_bad_images": True, "memory_limit_bytes": limit, "cache_dir": tmp_path / "cache"}
    images = decode(split, 6, **options)
    assert images.sides.tolist() == [[8, 6], [6, 17], [6, 6], [30, 6], [6, 6]] and images.skipped == (str(tmp_path / "bad.png"),)
    assert isinstance(images.pixels, np.memmap) == (limit < images.pixels.size)
    for i, shape in enumerate(SHAPES):
        expected = reference.resize(picture(*shape, 3, seed=i), *images.sides[i])
        assert images[i].dtype == np.uint8 and np.abs(images[i] - expected).max() <= 0.501
    total = sum(images[i].astype(np.float64).sum(axis=(0, 1)) for i in range(5))
    np.testing.assert_allclose(channel_mean(images), total / images.sides.prod(axis=1).sum(), rtol=1e-6)


def test_arrays_keep_their_aspect():
    split = Split(tuple("abc"), np.zeros(3, np.int32), pixels=picture(3, 8, 12, 3))
    images = decode(split, 6, mode="shorter_side")
    np.testing.assert_array_equal(images.sides, [[6, 9]] * 3)
    np.testing.assert_array_equal(images[1], ops.resize(split.pixels[1], 6, "shorter_side"))


@pytest.mark.parametrize("limit", [2**31, 0], ids=["memory", "file"])
def test_decoded_pixels_lie_in_memory_once(tmp_path, limit):
    images = decode(load_dataset("digits/target").train, 8, memory_limit_bytes=limit, cache_dir=tmp_path)
    read = images.reader.whole
    np.testing.assert_array_equal(read(3), images[3])
    images[3][:] = 77  # the tensor sees it: it is the same memory
    assert np.all(read(3).numpy() == 77)


@pytest.mark.parametrize("offset", [1, 8, 64])
def test_pixels_that_begin_anywhere_are_read(offset):
    memory = picture(offset + 4 * 6 * 6 * 3)
    for writeable in (True, False):
        memory.flags.writeable = writeable
        images = Images(memory[offset:].reshape(4, 6, 6, 3), np.arange(4, dtype=np.int32))
        x, _ = collect(test_batches(images, PLAIN, MEAN, batch_size=3))
        np.testing.assert_array_equal(np.concatenate(x), images.pixels - MEAN)


def test_progress_is_reported_to_the_end(tmp_path):
    for split in (load_dataset("digits/target").train, good_and_bad(tmp_path)[0]):
        calls = []
        decode(split, 4, skip_bad_images=True, progress=lambda done, count, calls=calls: calls.append((done, count)))
        assert calls[-1] == (150, 150) and calls == sorted(calls) and len(calls) >= 3


def test_channel_mean_is_the_mean_of_all_pixels():
    images = some_images(count=150)
    total = [0.0, 0.0, 0.0]
    for image in images.pixels:
        for c in range(3):
            total[c] += sum(int(p) for p in image[:, :, c].ravel())
    mean = channel_mean(images)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, np.array(total) / (150 * 36), rtol=1e-7)


PLAIN = Preprocessing(resize=6, crop=6, blur="none", mirror=False)
FULL = Preprocessing(resize=6, crop=4)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 5), (3, 8), (1, 2), (7, 1)])
def test_epochs_are_permutations_and_batches_span_them(count, batch_size):
    images = some_images(count)
    x, labels = collect(training_batches(images, PLAIN, MEAN, batch_size=batch_size, seed=3, iterations=9))
    assert [len(batch) for batch in x] == [batch_size] * 9
    stream, epochs = np.concatenate(labels), 9 * batch_size // count
    for epoch in range(epochs):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    np.testing.assert_array_equal(np.concatenate(x), images.pixels[stream].astype(np.float32) - MEAN)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only():
    images = some_images(10)
    streams = [
        np.concatenate(collect(training_batches(images, PLAIN, MEAN, batch_size=b, seed=s, iterations=30 // b))[1])
        for b, s in ((5, 0), (3, 0), (5, 1))
    ]
    np.testing.assert_array_equal(streams[0], streams[1])
    assert not np.array_equal(streams[0], streams[2])
    assert not np.array_equal(streams[0][:10], streams[0][10:20])


@pytest.fixture(scope="module")
def full():
    """The images and the 12 batches of a stream."""
    images = some_images(10)
    return images, list(training_batches(images, FULL, MEAN, batch_size=6, seed=3, iterations=12).as_numpy_iterator())


@pytest.mark.parametrize("first_step", [0, 1, 5, 11, 12])
def test_a_stream_resumes_to_the_bit(full, first_step):
    images, full = full
    rest = training_batches(images, FULL, MEAN, batch_size=6, seed=3, first_step=first_step, iterations=12)
    resumed = list(rest.as_numpy_iterator())
    assert len(resumed) == 12 - first_step
    for (x, labels), (x_again, labels_again) in zip(full[first_step:], resumed, strict=True):
        np.testing.assert_array_equal(x, x_again)
        np.testing.assert_array_equal(labels, labels_again)


@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_a_stream_make_up_the_stream(full, parts):
    images, whole = full

    def stream(**options):
        return list(training_batches(images, FULL, MEAN, batch_size=6, seed=3, iterations=5, **options).as_numpy_iterator())

    pieces = [stream(part=(i, parts)) for i in range(parts)]
    for batch, shares in zip(whole[:5], zip(*pieces, strict=True), strict=True):
        for full, joined in zip(batch, map(np.concatenate, zip(*shares, strict=True)), strict=True):
            np.testing.assert_allclose(joined, full, atol=1e-4)  # out of 255: the blur's vector code depends on the batch size
    for wrong in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(InputError, match="part is"):
            stream(part=wrong)


def packed_images(sides, seed=0):
    """Images with different sides, packed one after another."""
    sides = np.array(sides)
    return Images(picture(sides.prod(axis=1).sum(), 3, seed=seed), np.arange(len(sides), dtype=np.int32), sides=sides)


@pytest.mark.parametrize("resize_mode", ["squash", "shorter_side"])
@pytest.mark.parametrize("blur", ["gaussian", "authors", "none"])
def test_augmentation_applies_the_operations_in_order_with_separate_seeds(blur, resize_mode):
    # the pipeline draws the crop first and processes only its pixels; the oracle processes whole images
    tall = [(6, 9), (6, 6), (13, 6), (6, 7), (7, 6), (6, 20), (6, 8)]
    images, batch_size, seed = some_images(7) if resize_mode == "squash" else packed_images(tall), 4, 5
    preprocessing = Preprocessing(resize=6, crop=4, blur=blur, resize_mode=resize_mode)
    x, labels = collect(training_batches(images, preprocessing, MEAN, batch_size=batch_size, seed=seed, iterations=3))
    for place, (result, index) in enumerate(zip(np.concatenate(x), np.concatenate(labels), strict=True)):
        key = (place // 7) * 2**32 + int(index)
        expected = images[index].astype(np.float32)
        if blur == "authors":
            expected = ops.random_distortion(expected, np.array([4 * seed, key]))
        expected = expected - MEAN
        if blur == "gaussian":
            expected = ops.random_blur(expected, np.array([4 * seed, key]))
        expected = ops.random_mirror(expected, np.array([4 * seed + 1, key]))
        expected = ops.random_crop(expected, 4, np.array([4 * seed + 2, key]))
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-3)


def test_a_kernel_wider_than_the_image_is_reflected_again():
    images, wide = some_images(4, size=3), Preprocessing(resize=3, crop=3, blur_kernel=11, blur_sigma=(2.0, 3.0))
    x, labels = collect(training_batches(images, wide, MEAN, batch_size=4, seed=1, iterations=1))
    for result, index in zip(x[0], labels[0], strict=True):
        expected = ops.random_blur(images[index].astype(np.float32) - MEAN, np.array([4, index]), 11, (2.0, 3.0))
        expected = ops.random_mirror(expected, np.array([5, index]))
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("blur", ["gaussian", "authors"])
def test_every_epoch_draws_anew_though_the_pixels_stay(blur):
    images, whole = some_images(1, size=9), Preprocessing(resize=9, crop=9, blur=blur, mirror=False)
    before = images.pixels.copy()
    x, _ = collect(training_batches(images, whole, MEAN, batch_size=1, seed=0, iterations=6))
    assert len({batch.tobytes() for batch in x}) == 6
    np.testing.assert_array_equal(images.pixels, before)


def test_crops_reach_the_whole_of_a_long_image():
    images = packed_images([(6, 30)])
    only_crop = Preprocessing(resize=6, crop=6, blur="none", mirror=False, resize_mode="shorter_side")
    x, _ = collect(training_batches(images, only_crop, MEAN, batch_size=100, seed=0, iterations=4))
    windows = reference.windows(images[0], 6)
    counts = dict.fromkeys(windows, 0)
    for crop in np.concatenate(x):
        counts[next(place for place, window in windows.items() if np.array_equal(window - MEAN, crop))] += 1
    expected = 400 / 25
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 51.2  # chi2 with 24 dof at 0.001


def test_every_epoch_crops_anew():
    images = Images(picture(1, 40, 40, 3), np.zeros(1, np.int32))
    only_crop = Preprocessing(resize=40, crop=8, blur="none", mirror=False)
    x, _ = collect(training_batches(images, only_crop, MEAN, batch_size=1, seed=0, iterations=6))
    windows = reference.windows(images.pixels[0], 8)
    places = [next(p for p, w in windows.items() if np.array_equal(w - MEAN, crop[0])) for crop in x]
    assert len(set(places)) >= 5


def test_a_dataset_can_be_walked_twice():
    stream = training_batches(some_images(10), FULL, MEAN, batch_size=4, seed=1, iterations=3)
    for first, second in zip(collect(stream)[0], collect(stream)[0], strict=True):
        np.testing.assert_array_equal(first, second)


def test_bgr_turns_the_channels_and_nothing_else():
    images, bgr = some_images(10), Preprocessing(resize=6, crop=4, pixels=PIXELS["bgr"])
    for stream in (lambda p: training_batches(images, p, MEAN, batch_size=4, seed=1, iterations=3),
                   lambda p: test_batches(images, p, MEAN, batch_size=4)):  # fmt: skip
        for x, turned in zip(collect(stream(FULL))[0], collect(stream(bgr))[0], strict=True):
            np.testing.assert_array_equal(x[..., ::-1], turned)


def test_the_scale_comes_after_all_else_and_in_the_order_of_the_channels():
    images, scale = some_images(10), (0.5, 0.25, 2.0)
    for order in ("rgb", "bgr"):
        scaled = Preprocessing(resize=6, crop=4, pixels=PixelFormat(order, scale))
        turn = slice(None, None, -1 if order == "bgr" else 1)
        for stream in (lambda p: training_batches(images, p, MEAN, batch_size=4, seed=1, iterations=3),
                       lambda p: test_batches(images, p, MEAN, batch_size=4)):  # fmt: skip
            for x, y in zip(collect(stream(FULL))[0], collect(stream(scaled))[0], strict=True):
                np.testing.assert_array_equal((x * np.float32(scale))[..., turn], y)


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 64, [3])])
def test_test_batches_show_every_image_once_in_order(count, batch_size, sizes):
    images = some_images(count, size=7)
    x, labels = collect(test_batches(images, Preprocessing(resize=7, crop=4), MEAN, batch_size=batch_size))
    assert [len(batch) for batch in x] == sizes and x[0].dtype == np.float32 and labels[0].dtype == np.int32
    np.testing.assert_array_equal(np.concatenate(labels), np.arange(count))
    np.testing.assert_array_equal(np.concatenate(x), images.pixels[:, 1:5, 1:5] - MEAN)


@pytest.mark.parametrize("images", [some_images(5), packed_images([(6, 9), (11, 6), (6, 6)])], ids=["squash", "shorter_side"])
def test_ten_crops_are_corners_centre_and_their_mirror_images(images):
    preprocessing = Preprocessing(resize=6, crop=3, resize_mode="shorter_side")
    x, labels = collect(test_batches(images, preprocessing, MEAN, batch_size=2, crops=10))
    assert np.concatenate(labels).tolist() == list(range(len(images)))
    for i, result in enumerate(np.concatenate(x)):
        np.testing.assert_array_equal(result, np.stack(reference.ten_crops(images[i], 3)) - MEAN)
    one, _ = collect(test_batches(images, preprocessing, MEAN, batch_size=2))
    np.testing.assert_array_equal(np.concatenate(one), np.concatenate(x)[:, 4])
    with pytest.raises(InputError, match="crops is 5"):
        test_batches(images, preprocessing, MEAN, batch_size=2, crops=5)


def test_mapped_pixels_stream_like_those_in_memory(tmp_path):
    images = some_images(10)
    images.pixels.tofile(tmp_path / "pixels")
    mapped = Images(np.memmap(tmp_path / "pixels", np.uint8, "r", shape=images.pixels.shape), images.labels)
    np.testing.assert_array_equal(channel_mean(images), channel_mean(mapped))
    for stream in (lambda i: training_batches(i, FULL, MEAN, batch_size=4, seed=1, iterations=6),
                   lambda i: test_batches(i, FULL, MEAN, batch_size=4)):  # fmt: skip
        for x, again in zip(collect(stream(images))[0], collect(stream(mapped))[0], strict=True):
            np.testing.assert_array_equal(x, again)


def test_pixels_are_captured_and_not_embedded():
    images = Images(picture(2000, 16, 16, 3), np.zeros(2000, np.int32))
    stream = test_batches(images, Preprocessing(resize=16, crop=16), MEAN, batch_size=4)
    graph = stream._as_serialized_graph().numpy()  # would hold the tensors if they were constants of a function
    functions = tf.compat.v1.GraphDef.FromString(graph).library.function
    assert sum(node.ByteSize() for function in functions for node in function.node_def) < images.pixels.nbytes / 10


def test_batches_have_static_shapes():
    x, labels = training_batches(some_images(10), FULL, MEAN, batch_size=4, seed=1, iterations=3).element_spec
    assert x == tf.TensorSpec([4, 4, 4, 3]) and labels == tf.TensorSpec([4], tf.int32)
    x, labels = test_batches(some_images(10), FULL, MEAN, batch_size=4).element_spec
    assert x == tf.TensorSpec([None, 4, 4, 3]) and labels == tf.TensorSpec([None], tf.int32)


def test_streams_refuse_what_makes_no_sense():
    images = some_images(10)
    good = {"batch_size": 4, "seed": 0, "iterations": 3}
    for change, message in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"first_step": 4}, "first_step is 4"),
        ({"first_step": -1}, "first_step is -1"),
    ):
        with pytest.raises(InputError, match=message):
            training_batches(images, FULL, MEAN, **{**good, **change})
    with pytest.raises(InputError, match="decoded at 6 pixels, but resize is 256"):
        training_batches(images, Preprocessing(), MEAN, **good)
    with pytest.raises(InputError, match="kept their aspect, but resize_mode is squash"):
        training_batches(packed_images([(6, 9)]), FULL, MEAN, **good)
    with pytest.raises(InputError, match="no images"):
        test_batches(Images(picture(0, 6, 6, 3), np.zeros(0, np.int32)), FULL, MEAN, batch_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 200}, "crop is 224, larger than resize, 200"),
        ({"crop": 0}, "crop is 0"),
        ({"resize": 256.0}, "resize is 256.0"),
        ({"blur": "box"}, "blur is 'box': give one of gaussian, authors, none"),
        ({"resize_mode": "stretch"}, "resize_mode is 'stretch'"),
        ({"resize_filter": "cubic"}, "resize_filter is 'cubic'"),
        ({"pixels": "bgr"}, "pixels is 'bgr'"),
        ({"blur_kernel": 4}, "blur_kernel is 4"),
        ({"blur_sigma": (2.0, 0.1)}, "blur_sigma is"),
    ],
)
def test_preprocessing_is_checked(options, message):
    with pytest.raises(InputError, match=message):
        Preprocessing(**options)


def test_prepare_decodes_both_splits_and_takes_the_mean_of_the_training_images():
    dataset = load_dataset("digits/target").subset(5)
    task = pipeline.prepare(dataset, Preprocessing(resize=10, crop=8))
    assert (len(task.train), len(task.test), task.classes, task.digest) == (10, 547, ("even", "odd"), dataset.digest)
    np.testing.assert_allclose(task.mean, task.train.pixels.astype("float64").mean(axis=(0, 1, 2)), rtol=1e-6)


def test_a_part_of_the_images_shares_their_pixels_and_streams_alone():
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (9, 6, 6, 3), dtype=np.uint8), np.arange(9, dtype=np.int32)
    chosen = np.array([7, 2, 3])
    part, alone = Images(pixels, labels).take(chosen), Images(pixels[chosen], labels[chosen])
    assert part.pixels is pixels and len(part) == 3
    options = {"preprocessing": Preprocessing(resize=6, crop=4), "mean": np.zeros(3), "batch_size": 2}
    np.testing.assert_array_equal(channel_mean(part), channel_mean(alone))
    for stream, more in ((training_batches, {"seed": 1, "iterations": 4}), (test_batches, {})):
        for (x, y), (other_x, other_y) in zip(stream(part, **options, **more), stream(alone, **options, **more), strict=True):
            np.testing.assert_array_equal(x, other_x)
            np.testing.assert_array_equal(y, other_y)


def test_prepare_resizes_by_the_given_filter(tmp_path):
    image = picture(9, 20, 3)
    split = split_of(tmp_path, {"a.png": encoded(image, "PNG")})
    dataset = Dataset("one", ("a",), split, split)
    for name, reference_resize in (("area", reference.resize), ("bilinear", reference.resize_as_in_tensorflow_1)):
        task = pipeline.prepare(dataset, Preprocessing(resize=6, crop=4, resize_filter=name))
        assert np.abs(task.train[0] - reference_resize(image, 6, 6)).max() <= 0.501


def test_prepare_takes_a_given_mean():
    task = pipeline.prepare(load_dataset("digits/target").subset(5), Preprocessing(resize=10, crop=8), mean=(1, 2.5, 3))
    np.testing.assert_array_equal(task.mean, np.float32([1, 2.5, 3]))
    assert task.pixels == PixelFormat(mean=(1, 2.5, 3))
