"""Decoded pixels are stored once per content for all splits, processes and later commands; damaged ones are never read."""

import multiprocessing
import os
import sys

import numpy as np
import pytest
from test_pipeline import encoded, picture, split_of

from l2sp_tf.data import Preprocessing, decode, decoding, load_dataset, prepare, test_batches
from l2sp_tf.data.digests import file_digests
from l2sp_tf.data.store import PixelStore
from l2sp_tf.files.errors import InputError

HOW = (6, "squash", "area")


@pytest.fixture
def decoded(monkeypatch):
    """Records the names of decoded images, in order."""
    names, original = [], decoding._decoded

    def spied(split, how):
        names.extend(split.names)
        return original(split, how)

    monkeypatch.setattr(decoding, "_decoded", spied)
    return names


@pytest.fixture
def split(tmp_path):
    """150 images; the last two have the content of the first."""
    (tmp_path / "images").mkdir()
    contents = {f"{i:03}.png": encoded(picture(5, 7, 3, seed=i % 148), "PNG") for i in range(150)}
    return split_of(tmp_path / "images", contents, np.arange(150) % 2)


def stored(split, tmp_path, **options):
    return decode(split, 6, memory_limit_bytes=0, cache_dir=tmp_path / "cache", **options)


def store_of(tmp_path):
    (pixels,) = (tmp_path / "cache").glob("*.uint8")
    return pixels, pixels.with_suffix(".index")


def check(images, split):
    """Compares the images with those that are decoded into memory."""
    expected = decode(split, 6)
    np.testing.assert_array_equal([images[i] for i in range(len(images))], expected.pixels)
    np.testing.assert_array_equal(images.labels, expected.labels)
    np.testing.assert_array_equal(images.places, expected.places)
    streams = [list(test_batches(x, Preprocessing(6, 4), np.zeros(3), batch_size=64)) for x in (images, expected)]
    for one, two in zip(*streams, strict=True):
        np.testing.assert_array_equal(one[0], two[0])


def test_an_image_is_decoded_once_whatever_split_it_is_in(split, tmp_path, decoded):
    some = split.take([140, 3, 70, 149])
    check(stored(some, tmp_path), some)
    assert decoded[:4] == [some.names[i] for i in range(4)]
    del decoded[:]
    images = stored(split, tmp_path)
    assert sorted(decoded) == sorted(set(split.names[:148]) - set(some.names) - {split.names[1]})  # 149 has 1's content
    check(images, split)
    del decoded[:]
    stored(split, tmp_path), stored(some, tmp_path)
    assert decoded == [] and store_of(tmp_path)[0].stat().st_size == 148 * 6 * 6 * 3
    for how in ({"mode": "shorter_side"}, {"filter": "bilinear"}):  # other pixels lie in another store
        np.testing.assert_array_equal(stored(some, tmp_path, **how)[1], decode(some, 6, **how)[1])
    assert len(list((tmp_path / "cache").glob("*.uint8"))) == 3


def test_another_file_of_the_same_name_is_another_image(split, tmp_path, decoded):
    stored(split, tmp_path)
    del decoded[:]
    split.files[5].write_bytes(encoded(picture(5, 7, 3, seed=999), "PNG"))
    changed = split.take(range(150))
    check(stored(changed, tmp_path), changed)
    assert decoded[0] == split.names[5] and decoded[1:] == list(changed.names)  # `check` decodes all of them


@pytest.mark.parametrize("damage", ["pixel", "truncated", "gone", "entry", "index truncated", "index gone"])
def test_a_damaged_store_is_found_and_decoded_again(split, tmp_path, decoded, damage):
    stored(split, tmp_path)
    pixels, index = store_of(tmp_path)
    content = {path: bytearray(path.read_bytes()) for path in (pixels, index)}
    if damage == "pixel":
        content[pixels][7 * 108 + 50] ^= 1
    elif damage == "truncated":
        del content[pixels][100 * 108 + 7 :]
    elif damage == "entry":
        content[index][len(content[index]) // 2] ^= 1
    elif damage == "index truncated":
        del content[index][len(content[index]) // 2 + 5 :]
    pixels.write_bytes(content[pixels]), index.write_bytes(content[index])
    if damage.endswith("gone"):
        (index if damage.startswith("index") else pixels).unlink()
    del decoded[:]
    check(stored(split, tmp_path), split)
    again = len(decoded) - 150  # `check` decodes all
    assert {"pixel": again == 1, "entry": again == 1}.get(damage, 40 < again <= 148)
    del decoded[:]
    check(stored(split, tmp_path), split)
    assert len(decoded) == 150


def test_what_was_decoded_before_an_interruption_is_kept(split, tmp_path, decoded, monkeypatch):
    append, calls = PixelStore.append, []

    def cut(self, keys, images):
        calls.append(keys)
        if len(calls) == 2:
            with self._path.open("ab") as file:
                file.write(bytes(1000))  # pixels without an entry, ending inside a pixel
            raise KeyboardInterrupt
        append(self, keys, images)

    with monkeypatch.context() as patched:
        patched.setattr(PixelStore, "append", cut)
        with pytest.raises(KeyboardInterrupt):
            stored(split, tmp_path)
    del decoded[:]
    images = stored(split, tmp_path)
    assert len(decoded) == 148 - decoding.DECODE_BATCH
    check(images, split)


def test_a_full_disk_raises_and_loses_nothing(split, tmp_path, decoded, monkeypatch):
    stored(split.take(range(10)), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(PixelStore, "append", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            stored(split, tmp_path)
    del decoded[:]
    check(stored(split, tmp_path), split)
    assert len(decoded) == 138 + 150


def in_a_process(folder, cache, queue, barrier):
    load_dataset("digits/target")
    files = sorted(folder.iterdir())
    split = decoding_split(files)
    count, original = [], decoding._decoded

    def spied(split, how):
        count.extend(split.names)
        return original(split, how)

    decoding._decoded = spied
    barrier.wait()
    images = decode(split, 6, memory_limit_bytes=0, cache_dir=cache)
    queue.put((count, [int(images[i].sum()) for i in range(len(images))], "tensorflow_datasets" in sys.modules))


def decoding_split(files):
    from l2sp_tf.data import Split

    return Split(tuple(map(str, files)), np.arange(len(files), dtype=np.int32) % 2, files=tuple(files))


def test_two_processes_at_once_decode_each_image_once_and_import_no_tfds(split, tmp_path, decoded):
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(2, timeout=120)
    process = context.Process(target=in_a_process, args=(tmp_path / "images", tmp_path / "cache", queue, barrier))
    process.start()
    barrier.wait()
    images = stored(split, tmp_path)
    here, sums = list(decoded), [int(images[i].sum()) for i in range(len(images))]
    there, others, imported_tfds = queue.get(timeout=120)
    process.join()
    assert sorted(here + there) == list(split.names[:148]) and sums == others == [int(x.sum()) for x in decode(split, 6).pixels]
    assert not imported_tfds  # for digits and files of images


def test_bad_images_are_named_each_time_and_the_good_ones_are_kept(split, tmp_path, decoded):
    for i in (3, 99):
        split.files[i].write_bytes(b"")
    for expected in (148, 2):
        with pytest.raises(InputError, match=r"2 of 150 images cannot be decoded: .*003.png \(empty\); .*099.png \(empty\)\. "):
            stored(split, tmp_path)
        assert expected - 2 <= len(decoded) <= expected
        del decoded[:]
    images = stored(split, tmp_path, skip_bad_images=True)
    assert [name[-7:] for name in images.skipped] == ["003.png", "099.png"] and len(images) == 148
    assert len(images.take([0, 4])) == 2


def test_a_task_decodes_what_is_used(tmp_path, decoded):
    for part in ("train", "test"):
        for label, name in enumerate("ab"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                content = encoded(picture(5, 7, 3, seed=10 * i + label + 5 * (part == "test")), "PNG")
                (tmp_path / part / name / f"{i}.png").write_bytes(content)
    dataset = load_dataset(tmp_path)
    task = prepare(dataset, Preprocessing(6, 4), mean=(1, 2, 3))
    assert decoded == [] and len(task.train) == 8 and task.train.labels.tolist() == [0] * 4 + [1] * 4 and task.train.skipped == ()
    sample = task.train.sample([6, 1])
    assert decoded == [dataset.train.names[6], dataset.train.names[1]]
    assert task.test.pixels.shape == (8, 6, 6, 3) and decoded[2:] == list(dataset.test.names)
    np.testing.assert_array_equal(task.train.images.take([6, 1])[0], sample[0])
    del decoded[:]
    assert task.train.sample([2])[0].shape == (6, 6, 3) and decoded == []
    some = prepare(dataset, Preprocessing(6, 4), mean_of=[0, 3])
    assert decoded == [dataset.train.names[0], dataset.train.names[3]]
    np.testing.assert_allclose(some.mean, np.mean([task.train[0], task.train[3]], axis=(0, 1, 2)), rtol=1e-6)


def test_a_bad_image_matters_only_where_it_is_used(tmp_path, split):
    split.files[7].write_bytes(b"")
    dataset = load_dataset("digits/target")
    dataset = type(dataset)("made", ("a", "b"), split, dataset.test)
    task = prepare(dataset, Preprocessing(6, 4), mean=(0, 0, 0))
    assert len(task.train.sample([1, 2, 3])) == 3
    with pytest.raises(InputError, match="007.png"):
        task.train.sample([6, 7])
    left = prepare(dataset, Preprocessing(6, 4), mean=(0, 0, 0), skip_bad_images=True).train
    assert len(left.sample([7, 8])) == 1  # though no image of the sample is left of 7's class
    assert len(left) == 149 and len(left.skipped) == 1


def test_digests_are_remembered_until_a_file_changes(tmp_path, split, monkeypatch):
    old = os.stat(split.files[0]).st_mtime - 100
    files = list(split.files[:5])
    monkeypatch.setattr("l2sp_tf.data.digests.SETTLED_SECONDS", -1000)
    first = file_digests(files, tmp_path / "memory")
    assert first == file_digests(files)
    monkeypatch.setattr("l2sp_tf.data.digests._digest", lambda path: 1 / 0)
    assert file_digests(files[::-1], tmp_path / "memory") == first[::-1]
    monkeypatch.undo()
    content = bytearray(files[2].read_bytes())
    content[-1] ^= 1
    files[2].write_bytes(content)  # the same length as before
    os.utime(files[2], (old, old))
    second = file_digests(files, tmp_path / "memory")
    assert second == file_digests(files) and [a == b for a, b in zip(first, second, strict=True)] == [
        True,
        True,
        False,
        True,
        True,
    ]


def test_digests_of_files_that_have_just_changed_are_not_remembered(tmp_path, split):
    file_digests(split.files[:2], tmp_path / "memory")
    assert not (tmp_path / "memory").exists()
