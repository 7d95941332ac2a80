"""Data sets and their splits: the embedded digits, a folder of images, a zip of one, or a prepared set of TFDS."""

import collections
import dataclasses
import pathlib
import re

from l2sp_tf.data.folders import load_files
from l2sp_tf.data.sets import TFDS_NAME, one_form
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import refusing

TABLE_1 = ("caltech256/30", "caltech256/60", "stanford_dogs", "mit_indoors67")
PROTOCOLS = ("paper", "authors")


def load_dataset(spec, *, per_class=None, seed=None, classes=None, protocol="paper", data_dir=None, cache_dir=None):
    """Finds a data set and checks its layout; decodes no image on disk and downloads nothing.

    Args:
        spec: one of
            - "digits/source" or "digits/target";
            - the path of a folder <split>/<class>/<image> with the splits train (or training) and test (or testing). If there
              is no test, the only one of val, validation and valid is the test split. Capital letters do not matter,
              files of the system are left out, and a folder that is alone is stepped into;
            - the path of a zip of such a folder, with the folder's path inside the zip appended if it
              is one of several ("objects.zip/target");
            - the name of a prepared set of TensorFlow Datasets, with its configuration if it has several
              ("name/config"), and with "tfds:" in front if a folder has the same name.
        per_class: the number of training images to take of each class, as in `Dataset.subset`; None for
            all. Caltech 256 has no split of its own and needs this number, also as "caltech256/30". Under the
            paper's protocol all other images are for test. Under the authors' protocol the training images come
            from the first 60 of each class, and the 61st to the 80th are for test.
        seed: the seed of that drawing. None takes the first images, except for Caltech 256 under the paper's
            protocol, which draws them at random: there None means 0.
        classes: the classes of a network's outputs in their order, as `class_names` takes them, if they are more or in
            another order than the set's; labels then count them, and the splits may have different ones.
        protocol: "paper" or "authors"; they differ in Caltech 256 only.
        data_dir: the folder of TFDS's sets; None for its default.
        cache_dir: the folder for unpacked zips and the indices of TFDS sets, each made once; by default a
            folder of the user's among the temporary files. If given, it also holds the digests of a
            folder's files.

    Returns:
        A Dataset. Classes and files are sorted by name; the images of a TFDS set keep their order. The names of classes are in
        the Unicode form NFC, and `Dataset.notes` say what was left out or taken for something else.

    Raises:
        InputError: the data set does not exist or is not prepared, its layout is another, it has one class, a class is
            too small, or the zip is damaged or unsafe.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol is {protocol!r}: give paper or authors.")
    seed = drawing_seed(spec, per_class, seed, protocol)
    names = None if classes is None else class_names(classes)
    dataset = load_files(spec, cache_dir, partial=names is not None)
    if dataset is None:
        from l2sp_tf.data import tfds_sets  # TensorFlow Datasets takes seconds to import, and the other sets do not need it

        name = TFDS_NAME.fullmatch(str(spec))[1]
        if name.partition("/")[0] == "caltech256":
            dataset, per_class = tfds_sets.load_caltech256(name, per_class, seed, protocol, data_dir, cache_dir), None
        else:
            dataset = tfds_sets.load_tfds(name, data_dir, cache_dir)
    dataset = dataset if per_class is None else dataset.subset(per_class, seed)
    if names is not None:
        return _among(dataset, names)
    if len(dataset.classes) < 2:
        raise InputError(f"{dataset.name} has one class, {dataset.classes[0]!r}: a classifier needs at least two.")
    return dataset


def class_names(classes):
    """Returns the classes of a network's outputs in their order.

    Args:
        classes: "imagenet" for the WordNet identifiers of ImageNet's 1000 classes; the path of a text file with one class a
            line; or a list of names. A line "0-999" stands for the numbers from 0 to 999, and then "007" is the class 7.

    Raises:
        InputError: there is no such file, or it names a class twice or none.
    """
    if isinstance(classes, str | pathlib.Path):
        path = pathlib.Path(__file__).with_name("imagenet_classes.txt") if classes == "imagenet" else pathlib.Path(classes)
        if not path.is_file():
            raise InputError(f"There is no file {path} of class names: give imagenet, or a text file with one class a line.")
        with refusing(f"{path} is not a text file of class names"):
            classes = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    classes = tuple(map(one_form, classes))
    if len(classes) == 1 and (ends := re.fullmatch(r"(\d{1,6})-(\d{1,6})", classes[0])):
        classes = NumberedClasses(map(str, range(int(ends[1]), int(ends[2]) + 1)))
    if not classes:
        raise InputError("There are no class names: give one a line.")
    _check_each_once("The class names", classes)
    return classes


def _check_each_once(what, names):
    twice = next((name for name, count in collections.Counter(names).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{what} have {twice!r} twice: give each once.")


class NumberedClasses(tuple):
    """Class names that are numbers, and are compared as numbers."""


def _among(dataset, names):
    """Labels a set by the classes of a network, compared as numbers if they are numbered."""
    own = tuple(map(one_form, dataset.classes))
    if isinstance(names, NumberedClasses):
        own = tuple(str(int(name)) if name.isascii() and name.isdigit() else name for name in own)
    _check_each_once(f"The classes of {dataset.name}", own)  # as "7" and "007"
    return dataclasses.replace(dataset, classes=own).among(names)


def drawing_seed(spec, per_class, seed, protocol):
    """Returns the seed with which `load_dataset` draws training images at random; None if it takes the first ones, or all."""
    found = TFDS_NAME.fullmatch(str(spec))
    if found is not None and found[1].partition("/")[0] == "caltech256":
        return 0 if seed is None and protocol == "paper" else seed
    return seed if per_class is not None else None


def table_1_rows(*, protocol="paper", data_dir=None, cache_dir=None):
    """Returns the characteristics of the target data sets of Table 1, for `reports.tables.table_1`.

    Args:
        protocol, data_dir, cache_dir: as in `load_dataset`.

    Returns:
        A list of dicts, one for each of TABLE_1; for a set that cannot be loaded only "name" and, under
        "missing", the reason.
    """
    rows = []
    for spec in TABLE_1:
        try:
            row = load_dataset(spec, protocol=protocol, data_dir=data_dir, cache_dir=cache_dir).characteristics()
        except InputError as error:
            row = {"missing": str(error)}
        rows.append(row | {"name": spec})
    return rows
