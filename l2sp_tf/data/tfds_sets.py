"""Prepared sets of TensorFlow Datasets: their splits, their labels, and their images one by one."""

import dataclasses
import hashlib
import pathlib
import shlex

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from l2sp_tf.data.sets import ACCEPTED, Dataset, Split, default_cache_dir
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import MAX_IMAGE_BYTES, read_json, refusing
from l2sp_tf.files.writing import atomic_path

# Their test images have no published labels, so accuracy is measured on the validation images.
UNLABELLED_TEST = ("imagenet2012", "places365_small")
AUTHORS_TRAIN, AUTHORS_TEST = 60, 20  # images of each class of Caltech 256 in the authors' lists
MAX_CLASSES = 10**6
TFRECORD_HEADER, TFRECORD_FOOTER = 12, 4  # bytes before a record (length, checksum of it) and after it (checksum)


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Images in the shards of a TFDS split, read one by one.

    Attributes:
        key: the feature that holds the image.
        shards: the paths of the TFRecord files.
        shard, offset, length: int64 [n]: the shard of each record, its offset in it, and its length in bytes.
        prints: int64 [n], a hash of the bytes of each image.
    """

    key: str
    shards: tuple
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    prints: np.ndarray

    def __len__(self):
        return len(self.shard)

    def take(self, positions):
        """Returns the records at `positions` alone, in that order."""
        arrays = {name: getattr(self, name)[positions] for name in ("shard", "offset", "length", "prints")}
        return dataclasses.replace(self, **arrays)

    def read(self, i):
        """Reads the bytes of the i-th image, a JPEG or PNG file."""
        with open(self.shards[self.shard[i]], "rb") as file:
            file.seek(self.offset[i])
            content = file.read(self.length[i])
        return tf.train.Example.FromString(content).features.feature[self.key].bytes_list.value[0]


def load_tfds(name, data_dir=None, cache_dir=None):
    """Loads the training and test images of a prepared TFDS set: a Dataset.

    The test split is "test"; it is "validation" if there is no "test", or if "test" has no labels.

    Raises:
        InputError: the set is unknown or not prepared, has no images with labels, or lacks a split.
    """
    builder = _prepared(name, data_dir)
    splits = builder.info.splits
    test = "validation" if builder.name in UNLABELLED_TEST or "test" not in splits else "test"
    for split in ("train", test):
        if split not in splits or not splits[split].num_examples:
            raise InputError(
                f"{name} has only the splits {', '.join(splits) or 'none'}, but train and test (or validation) are needed: write "
                "its images to a folder <split>/<class>/<image>, and give that."
            )
    image, label = _keys(builder)
    train, test = (_split(builder, split, image, label, cache_dir) for split in ("train", test))
    return Dataset(name, tuple(builder.info.features[label].names), train, test)


def load_caltech256(name, per_class, seed, protocol, data_dir=None, cache_dir=None):
    """Loads Caltech 256, split as in `load_dataset`: a Dataset.

    Raises:
        InputError: per_class is missing or too large, or the set is not prepared.
    """
    size = name.partition("/")[2]
    given = {str(value) for value in (size or None, per_class) if value is not None}
    if len(given) != 1 or not min(given).isdecimal():
        raise InputError(
            f"{name} with per_class={per_class} names no split: give caltech256/30 or caltech256/60 as in Table 1, or caltech256 "
            "and --per_class=30."
        )
    per_class = int(min(given))
    builder = _prepared("caltech256", data_dir)
    all_images = _split(builder, "train", "image", "label", cache_dir)
    whole = Dataset(f"caltech256-{per_class}", tuple(builder.info.features["label"].names), all_images, all_images)
    if protocol == "authors":
        if per_class > AUTHORS_TRAIN:
            raise InputError(f"per_class is {per_class}: the authors' lists have at most {AUTHORS_TRAIN} images per class.")
        pool, listed = whole.draw(AUTHORS_TRAIN), whole.draw(AUTHORS_TRAIN + AUTHORS_TEST)
        whole = dataclasses.replace(whole, train=all_images.take(pool), test=all_images.take(np.setdiff1d(listed, pool)))
        return whole.subset(per_class, seed)
    chosen = whole.draw(per_class, seed)
    test = all_images.take(np.setdiff1d(np.arange(len(all_images)), chosen))
    lost = np.setdiff1d(all_images.labels, test.labels)
    if lost.size:
        raise InputError(f"per_class is {per_class}: that leaves no test image of {whole.classes[lost[0]]}; give fewer.")
    return dataclasses.replace(whole, train=all_images.take(chosen), test=test)


def data_folder(data_dir=None):
    """Returns the folder of TFDS's sets."""
    return pathlib.Path(tfds.core.constants.DATA_DIR if data_dir is None else data_dir).expanduser()


def known_names():
    """Lists the names of the sets that can be prepared: those of TFDS and those of `builders`."""
    from l2sp_tf.data import builders  # noqa: F401  its classes register themselves

    return tfds.list_builders(with_community_datasets=False)


def find_prepared(name, data_dir=None):
    """Returns the builder of a prepared set, read from its folder alone, or None if the set is not there.

    Raises:
        InputError: the files that describe the set are damaged, or name features or files of other packages or folders.
    """
    place = data_folder(data_dir)
    with refusing(f"The data set {name} in {place} is damaged", "remove its folder, and run prepare.py again"):
        _check_features(place / name.partition(":")[0])
        try:
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=place)
        except tfds.core.registered.DatasetNotFoundError:
            return None
        for split in builder.info.splits.values():
            if any(pathlib.Path(path).parent != pathlib.Path(builder.data_path) for path in split.filepaths):
                raise ValueError(f"the files of {split.name} are in another folder")
        return builder


def _check_features(folder):
    """Refuses features of other packages, which TFDS would import, and more classes than a set can have."""
    for path in folder.rglob("features.json"):
        described = [read_json(path, f"{path} is damaged")]
        for value in described:  # the list grows during the loop
            described.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
            if not isinstance(value, dict):
                continue
            for key in ("pythonClassName", "python_class_name", "type"):
                if key in value and not str(value[key]).startswith("tensorflow_datasets.core.features."):
                    raise ValueError(f"{path} asks for {str(value[key])[:100]}, which is not a feature of TFDS")
            for key in ("numClasses", "num_classes"):
                if not 0 <= int(value.get(key, 0)) <= MAX_CLASSES:
                    raise ValueError(f"{path} has {value[key]} classes, more than the {MAX_CLASSES:,} allowed")


def _prepared(name, data_dir):
    builder = find_prepared(name, data_dir)
    if builder is not None:
        return builder
    if name.partition("/")[0] not in known_names():
        raise InputError(f"There is no data set {name!r}: give {ACCEPTED}.")
    folder = data_folder(data_dir)
    command = f"python prepare.py --data_dir={shlex.quote(str(folder))} {name}"
    raise InputError(f"{name} is not prepared in {folder}: run {command} first.")


def _keys(builder):
    """Returns the names of the features that hold the image and its label."""
    features = builder.info.features if hasattr(builder.info.features, "keys") else {}
    keys = [name for name in builder.info.supervised_keys or () if isinstance(name, str)]
    names = [name for name in keys or features if name in features]  # keys and features come from different files
    images = [name for name in names if type(features[name]) is tfds.features.Image and features[name].np_dtype == np.uint8]
    labels = [name for name in names if type(features[name]) is tfds.features.ClassLabel]
    if len(images) != 1 or len(labels) != 1:
        raise InputError(
            f"{builder.name} has no image with a class as its label (its features: {', '.join(sorted(features))}): give the "
            "name of an image classification set."
        )
    return images[0], labels[0]


def _split(builder, split, image, label, cache_dir):
    shards = tuple(str(path) for path in builder.info.splits[split].filepaths)
    index = _index(builder, split, shards, image, label, cache_dir)
    labels = index.pop("labels").astype(np.int32)
    if len(labels) and labels.min() < 0:
        raise InputError(f"The {split} images of {builder.name} have no labels: give another data set.")
    if len(labels) and labels.max() >= builder.info.features[label].num_classes:
        raise _damaged(builder, f"a label is {labels.max()}, beyond its classes")
    if len(labels) != builder.info.splits[split].num_examples:
        raise _damaged(builder, f"{split} has {len(labels)} images, not {builder.info.splits[split].num_examples}")
    names = tuple(f"{builder.name} {split} image {i}" for i in range(len(labels)))
    return Split(names, labels, records=Records(image, shards, **index))


def _index(builder, split, shards, image, label, cache_dir):
    """Returns offset, length, label and image hash of each record in a split, read once and then kept in a file."""
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        raise InputError(f"{builder.name} is prepared as {builder.info.file_format.value} files: prepare it again as tfrecord.")
    try:
        identity = repr([(path, (s := pathlib.Path(path).stat()).st_size, s.st_mtime_ns) for path in shards])
    except FileNotFoundError as error:
        raise _damaged(builder, f"{error.filename} is missing") from error
    digest = hashlib.sha256(f"{image} {label} {identity}".encode()).hexdigest()[:16]
    folder = pathlib.Path(default_cache_dir() if cache_dir is None else cache_dir)
    path = folder / f"index-{builder.name}-{split}-{digest}.npz"
    if not path.exists():
        parts = [_index_of_shard(builder, number, shard, image, label) for number, shard in enumerate(shards)]
        with atomic_path(path) as temporary:
            np.savez(temporary, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    with refusing(f"{path} is damaged", "remove it"):
        with np.load(path) as file:
            return dict(file)


def _index_of_shard(builder, number, shard, image, label):
    features = {image: tf.io.FixedLenFeature([], tf.string), label: tf.io.FixedLenFeature([], tf.int64)}

    def facts(record):
        example = tf.io.parse_single_example(record, features)
        return example[label], tf.strings.to_hash_bucket_fast(example[image], 2**63 - 1)

    offset, length = _places(builder, shard)
    batches = tf.data.TFRecordDataset(shard).map(facts, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).batch(1024)
    try:
        columns = list(zip(*batches.as_numpy_iterator(), strict=True)) or [[np.empty(0, np.int64)]] * 2
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        raise _damaged(builder, f"{shard} is damaged") from error
    labels, prints = (np.concatenate(column).astype(np.int64) for column in columns)
    return {"shard": np.full(len(length), number), "offset": offset, "length": length, "labels": labels, "prints": prints}


def _places(builder, shard):
    """Returns the offset and length of each record in a shard, checked before TensorFlow reserves memory: two int64 [n]."""
    offset, length, place, end = [], [], 0, pathlib.Path(shard).stat().st_size
    with open(shard, "rb", buffering=0) as file:
        while place < end:
            file.seek(place)
            header = file.read(TFRECORD_HEADER)
            size = int.from_bytes(header[:8], "little")
            offset.append(place + TFRECORD_HEADER)
            length.append(size)
            place = offset[-1] + size + TFRECORD_FOOTER
            if size > MAX_IMAGE_BYTES or place > end:
                raise _damaged(builder, f"{shard} is damaged")
    return np.array(offset, np.int64), np.array(length, np.int64)


def _damaged(builder, what):
    folder = builder.data_path
    return InputError(f"{builder.name} is prepared in {folder}, but {what}: remove that folder, and run prepare.py again.")
