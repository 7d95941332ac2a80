"""Damages and forges files of every format that the project reads: `python tests/hostile.py FORMAT COUNT SEED`."""

import contextlib
import copy
import functools
import io
import json
import pathlib
import random
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile

import keras
import numpy as np
import tensorflow as tf
import torch_writer
from PIL import Image

import l2sp_tf as l2sp
from l2sp_tf.data import builders, decode, load_dataset
from l2sp_tf.experiments import records
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.provenance import provenance
from l2sp_tf.fisher.diagonal import Fisher
from l2sp_tf.models import convert, keras_files
from l2sp_tf.models.pixels import PIXELS, Interface, PixelFormat
from l2sp_tf.models.torch_files import read_state_dict
from l2sp_tf.reports import tables

MOST_SECONDS = 10  # of processor time for one file
MOST_GROWTH = 768 * 2**20  # bytes that the process may have more in use at its peak than at the start: 256 MiB in two copies, and
# what TensorFlow keeps

EXTREMES = (0, 1, 0x7F, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES = (
    *(None, True, -1, 0, 2**31, 2**63, 10**30, 10**99, 0.5, -1e308, float("nan"), float("inf"), "", "\0", "../x", "é" * 40),
    *("9" * 400, [], {}, [[[]]], [1e9] * 5, {"": {}}, {"class_name": "Lambda", "config": {}, "module": "keras.layers"}),
)


def damaged(content, rng):
    """The bytes after one to three accidents: bits flipped, ends lost, bytes inserted, numbers overwritten, parts moved."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = len(content)
        edges = [rng.randrange(size + 1), rng.randrange(min(size, 96) + 1), size - rng.randrange(min(size, 96) + 1)]
        place = rng.choice(edges)
        kind = rng.randrange(6)
        if kind == 0 and place < size:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[place:]
        elif kind == 2:
            content[place:place] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif kind == 3:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(EXTREMES) % 2 ** (8 * width)
            content[place : place + width] = value.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 4:
            source, length = rng.randrange(size + 1), rng.choice((1, 4, 16, 200))
            content[place : place + length] = content[source : source + length]
        else:
            del content[place : place + rng.choice((1, 2, 8, 100))]
    return bytes(content)


def forged_json(value, rng):
    """A JSON text with one value, name or text inside replaced, lost or doubled."""
    value = copy.deepcopy(value)
    places = []

    def walk(parent):
        for key in list(parent) if isinstance(parent, dict) else range(len(parent)):
            places.append((parent, key))
            if isinstance(parent[key], (dict, list)):
                walk(parent[key])

    walk(value)
    parent, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(("", "\0", "x", "..", "shape"))] = parent.pop(key)
    elif kind == 2 and isinstance(parent[key], str) and parent[key][:1] in ("{", "["):
        with contextlib.suppress(ValueError):  # which may be forged already
            parent[key] = forged_json(json.loads(parent[key]), rng)  # JSON within JSON
    else:
        parent[key] = rng.choice(VALUES)
    text = json.dumps(value)
    if kind == 3:
        text = text.replace('{"', '{"x": 1, "x": 2, "', 1)
    elif kind == 4:
        text = rng.choice(("[" * 10**5, text.replace(": ", ": " + "[" * 2000, 1), text.replace("0", "1" * 5000, 1), text))
    return text


def forged_safetensors(content, rng):
    """A header with another value, its length set right or not."""
    (length,) = struct.unpack_from("<Q", content)
    header = forged_json(json.loads(content[8 : 8 + length]), rng).encode()
    length = rng.choice(EXTREMES) % 2**64 if rng.random() < 0.1 else len(header)
    return struct.pack("<Q", length) + header + content[8 + struct.unpack_from("<Q", content)[0] :]


def forged_zip(content, rng, change):
    """A zip whose checksums are right, one of its members changed, renamed, doubled or lost."""
    members = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    chosen, kind = rng.randrange(len(members)), rng.randrange(8)
    name, inside = members[chosen]
    if kind == 0:
        del members[chosen]
    elif kind == 1:
        members[chosen] = rng.choice(("", "../x.jpg", "/x.jpg", "a\\b.jpg", "x" * 300, "train", "train/x/y/z.jpg", "\0x")), inside
    elif kind == 2:
        members.append((name, inside))
    else:
        members[chosen] = name, change(name, inside, rng)
    packed = io.BytesIO()
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(packed, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive,
    ):
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, inside in members:
            info = zipfile.ZipInfo(name or "x")
            info.external_attr = rng.choice((0, 0, 0, 0o100644, 0o120777)) << 16
            archive.writestr(info, inside)
    return packed.getvalue()


def changed_member(name, content, rng):
    return forged_json(json.loads(content), rng).encode() if name.endswith(".json") else damaged(content, rng)


# Each format: how a good file is made, how it is read (what comes back must equal what the good file gives), how it is forged.


@functools.cache
def model():
    inputs = keras.Input((4, 4, 3))
    x = keras.layers.BatchNormalization(name="bn")(keras.layers.Conv2D(3, 3, name="conv")(inputs))
    x = keras.layers.Dense(2, name="predictions")(keras.layers.GlobalAveragePooling2D(name="pool")(x))
    return keras.Model(inputs, x, name="m")


def arrays():
    rng = np.random.default_rng(0)
    return {"a/kernel": rng.normal(size=(3, 4)).astype("float32"), "a/bias": np.arange(4, dtype="float16")}


def make_anchors(folder):
    known = {"pixels": PIXELS["bgr"].plain(), "provenance": {"origin": "test", "files": {"a": "b"}}}
    l2sp.Anchors(arrays(), known).save(folder / "a.safetensors")
    return folder / "a.safetensors"


def read_anchors(path):
    anchors = l2sp.Anchors.load(path)
    return anchors.digest, sorted(anchors.metadata.items())  # safetensors writes them in any order


def make_fisher(folder):
    provenance = {"source": "s", "images": 8, "mode": "mc", "samples": 1, "seed": 0, "first": 0, "model": "m", "transforms": []}
    provenance["weights"] = {"a/kernel": "0" * 64}
    Fisher({"a/kernel": np.ones((3, 4), "float32")}, provenance, {"a": [2, 8, 0.5, 0.5]}).save(folder / "f.safetensors")
    return folder / "f.safetensors"


def read_fisher(path):
    fisher = Fisher.load(path)
    return fisher.digest, repr(fisher), repr(fisher.standard_error()), repr(fisher.normalise())


def make_record(folder):
    after = {"accuracy": 0.5, "correct": 50, "total": 100}
    results = {"accuracy": 0.5, "correct": 4, "total": 8, "right": "0f", "r2": {"conv1": dict.fromkeys(records.BOX, 0.5)}}
    results["source"] = {"before": after, "target_statistics": after, "source_statistics": after}
    settings = {"source": "s", "target": "t", "penalty": "l2", "alpha": 0.1, "beta": 0.01, "seed": 0, "frozen": 0, "per_class": 3}
    settings |= {"code": 2, "recipe": {"learning_rate": 0.01, "solver": "sgd"}}
    rest = {"coverage": {"digest": "c"}, "anchors": {"digest": "a"}, **provenance()}
    records.write_record(folder / "run.json", {"settings": settings, "results": results, **rest})
    return folder / "run.json"


def read_record(path):
    found = [records.read_record(path)]
    tables.overview(found).markdown()
    tables.table_csv(found)
    tables.right(found[0])


def make_pixels(folder):
    (folder / "p.json").write_text(PIXELS["bgr"].to_json())
    return folder / "p.json"


def read_pixels(path):
    str(PixelFormat.from_json(path.read_bytes(), path))


def make_keras(folder):
    keras_files.save_model(model(), folder / "m.keras", Interface(PIXELS["rgb"], 10, "squash", "area", 8, classes=("a", "b")))
    return folder / "m.keras"


def read_keras(path):
    str(keras_files.stored_interface(path))
    found = keras_files.load_model(path)
    keras.utils.clear_session(free_memory=False)
    return [value.tobytes() for value in found.get_weights()]


def make_h5(folder):
    model().save_weights(folder / "m.weights.h5")
    return folder / "m.weights.h5"


def read_h5(path):
    before = model().get_weights()
    try:
        keras_files.load_weights(model(), path)
    except InputError:
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, model().get_weights(), strict=True))
        raise
    model().set_weights(before)


def make_torch(write, folder):
    write(folder / "a.pth", {"conv.weight": arrays()["a/kernel"], "n": np.arange(3)})
    return folder / "a.pth"


def read_torch(path):
    found = read_state_dict(path)
    assert sum(array.size for array in found.values()) <= 100 * path.stat().st_size
    return sorted((name, array.shape, array.tobytes()) for name, array in found.items())


def make_checkpoint(part, folder):
    names = ["scope/conv1/weights", "scope/conv1/biases"]
    options = {
        "tensor_names": names,
        "data" if part == "v1" else "tensors": [tf.constant(a, tf.float32) for a in arrays().values()],
    }
    if part == "v1":
        tf.raw_ops.Save(filename=str(folder / "a.ckpt"), **options)
        return folder / "a.ckpt"
    tf.raw_ops.SaveV2(prefix=str(folder / "a.ckpt"), shape_and_slices=[""] * 2, **options)
    return next(folder.glob(f"a.ckpt.{part}*"))


def read_checkpoint(path):
    path = path.parent / "a.ckpt"
    found = convert._read_checkpoint(path, sorted(path.parent.glob("a.ckpt*")))
    return sorted((name, array.shape, array.tobytes()) for name, array in found.items())


def picture(kind, seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)).save(file, kind, lossless=True)
    return file.getvalue()


def make_zip(folder):
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        for number, name in enumerate(("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png")):
            archive.writestr(name, picture("PNG", number))
    return folder / "x.zip"


def read_zip(path):
    with tempfile.TemporaryDirectory() as cache:
        data = load_dataset(path, cache_dir=cache)
        assert all(file.resolve().is_relative_to(pathlib.Path(cache).resolve()) for file in data.train.files)
        return data.digest


def make_image(kind, folder):
    (folder / "i.png").write_bytes(picture(kind))
    return folder / "i.png"


def read_image(path):
    from l2sp_tf.data import Split

    good = path.with_name("good.png")
    good.write_bytes(picture("PNG", 1))
    split = Split(("bad", "good"), np.zeros(2, np.int32), files=(path, good))
    for mode in ("squash", "shorter_side"):
        decode(split, 4, mode=mode, skip_bad_images=True)


def read_odd_image(path):
    image = builders.as_jpeg_or_png(path.read_bytes())
    assert len(image) < 10**6


def make_tar(folder):
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number in range(3):
            member = tarfile.TarInfo(f"256_ObjectCategories/001.x/001_000{number}.jpg")
            member.size = len(picture("PNG", number))
            archive.addfile(member, io.BytesIO(picture("PNG", number)))
    return folder / "a.tar"


def read_tar(path):
    names = builders._members(path)
    with builders.refusing("x"):  # as `preparation` does for all of a builder
        for _, example in builders._Builder._generate_examples(None, path, [(name, "x") for name in names]):
            assert len(example["image"]) < 10**6


def make_shard(which, folder):
    from test_tfds import write_set

    examples = [(picture("PNG", i), i % 2) for i in range(4)]
    write_set(folder, "mnist", {"train": examples, "test": examples}, 2)
    return next((folder / "mnist/1.0.0").glob(which))


def read_shard(path):
    with tempfile.TemporaryDirectory() as cache:
        data = load_dataset("mnist", data_dir=path.parents[2], cache_dir=cache)
        for i in range(len(data.train)):
            data.train.read(i)
        return data.digest


def only(change):
    """A forger of files that are JSON as a whole."""
    return lambda content, rng: change(json.loads(content), rng).encode()


# name: (make, read, forge or None, whether damage never goes unnoticed, files in the default run)
FORMATS = {
    "anchors": (make_anchors, read_anchors, forged_safetensors, True, 500),
    "fisher": (make_fisher, read_fisher, forged_safetensors, True, 500),
    "record": (make_record, read_record, only(forged_json), False, 500),
    "pixels": (make_pixels, read_pixels, only(forged_json), False, 500),
    "keras": (make_keras, read_keras, functools.partial(forged_zip, change=changed_member), True, 60),
    "h5": (make_h5, read_h5, None, False, 80),
    "torch zip": (functools.partial(make_torch, torch_writer.torch_zip), read_torch, None, True, 400),
    "torch zip, forged": (
        functools.partial(make_torch, torch_writer.torch_zip),
        read_torch,
        functools.partial(forged_zip, change=changed_member),
        False,
        200,
    ),
    "torch legacy": (functools.partial(make_torch, torch_writer.torch_legacy), read_torch, None, False, 500),
    "checkpoint v1": (functools.partial(make_checkpoint, "v1"), read_checkpoint, None, False, 200),
    "checkpoint index": (functools.partial(make_checkpoint, "index"), read_checkpoint, None, True, 200),
    "checkpoint data": (functools.partial(make_checkpoint, "data"), read_checkpoint, None, True, 100),
    "zip": (make_zip, read_zip, functools.partial(forged_zip, change=lambda name, content, rng: content), True, 100),
    "jpeg": (functools.partial(make_image, "JPEG"), read_image, None, False, 8),
    "png": (functools.partial(make_image, "PNG"), read_image, None, False, 8),
    "gif": (functools.partial(make_image, "GIF"), read_image, None, False, 8),
    "bmp": (functools.partial(make_image, "BMP"), read_image, None, False, 8),
    "webp": (functools.partial(make_image, "WebP"), read_image, None, False, 8),
    "gif of a builder": (functools.partial(make_image, "GIF"), read_odd_image, None, False, 100),
    "bmp of a builder": (functools.partial(make_image, "BMP"), read_odd_image, None, False, 100),
    "tar": (make_tar, read_tar, None, False, 200),
    "tfrecord": (functools.partial(make_shard, "*train.tfrecord-00000*"), read_shard, None, True, 8),
    "tfds features": (functools.partial(make_shard, "features.json"), read_shard, only(forged_json), False, 8),
    "tfds info": (functools.partial(make_shard, "dataset_info.json"), read_shard, only(forged_json), False, 8),
}


def attack(name, count, seed, note=lambda text: None):
    """Reads `count` bad files of a format, and returns how many were read, refused, and what went wrong with which."""
    make, read, forge, verified, _ = FORMATS[name]
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        path = make(folder)
        good, expected = path.read_bytes(), read(path)
        found = {"read": 0, "refused": 0, "wrong": []}
        for number in range(count):
            rng = random.Random(f"{name} {seed} {number}")
            forging = forge is not None and rng.random() < 0.5
            path.write_bytes(forge(good, rng) if forging else damaged(good, rng))
            note(f"{name} {seed} {number}")
            start = time.process_time()
            try:
                same = read(path) == expected
                found["read"] += 1
                if verified and not forging and not same:
                    found["wrong"].append(f"{number}: damage went unnoticed")
            except InputError as error:
                found["refused"] += 1
                if not 20 < len(str(error)) < 1500 or "\n" in str(error):
                    found["wrong"].append(f"{number}: no sentence: {str(error)[:300]}")
            except Exception as error:
                found["wrong"].append(f"{number}: {type(error).__name__}: {str(error)[:300]}")
            if time.process_time() - start > MOST_SECONDS:
                found["wrong"].append(f"{number}: took {time.process_time() - start:.1f} s")
        return found
    finally:
        shutil.rmtree(folder)


def main(names, counts, seed, note_path):
    """Attacks formats one after the other, and prints the findings as JSON; the last file tried is always noted."""
    warnings.simplefilter("ignore")
    found = {}
    with open(note_path, "w") as notes:

        def note(text):
            notes.seek(0)
            notes.write(text.ljust(60))
            notes.flush()

        for name, count in zip(names, counts, strict=True):
            attack(name, 3, "warm", note)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found[name] = attack(name, count, seed, note)
            growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            if growth > MOST_GROWTH:
                found[name]["wrong"].append(f"the process grew by {growth:,} bytes")
            found[name]["MiB"] = growth >> 20
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1].split(";"), [int(count) for count in sys.argv[2].split(";")], sys.argv[3], sys.argv[4])
