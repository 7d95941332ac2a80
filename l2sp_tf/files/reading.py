"""Reads untrusted files: nothing in them is executed, and memory is taken only as far as the file's size allows."""

import contextlib
import errno
import json
import math
import re
import stat
import zipfile

import h5py
import keras
import numpy as np

from l2sp_tf.files.errors import InputError

MAX_PIXELS = 178_956_970  # in an image, by its header: more would be a decompression bomb
MAX_IMAGE_BYTES = 2**28  # in an image file
SPARE_BYTES = 2**28  # allowed to any file when it is unpacked or becomes a model, however small it is
MAX_JSON_BYTES = 2**26
MAX_JSON_DEPTH = 100
BFLOAT16 = np.dtype("V2")  # as Keras writes it to HDF5
MAX_DIGITS = 100  # in a whole number in JSON: more would overflow a float


@contextlib.contextmanager
def refusing(what, advice="use another copy"):
    """Turns any exception of the block into one InputError; disk errors pass through.

    Args:
        what: the beginning of the sentence, such as "a.keras is damaged or not a model".
        advice: its end.

    Raises:
        InputError: the block raised anything but an OSError of the system.
    """
    try:
        yield
    except Exception as error:  # readers of damaged files raise exceptions of any kind
        of_the_system = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)  # EINVAL: a seek before the start
        if isinstance(error, InputError) or of_the_system:
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{what} ({reason}): {advice}.") from error


def unpacked_limit(size):
    """Returns how many bytes a file of `size` bytes may unpack to: a hundred times its size plus 256 MiB."""
    return 100 * size + SPARE_BYTES


def parse_json(text, what, *, finite=True):
    """Reads JSON strictly.

    Args:
        text: str, or bytes in UTF-8.
        what: the beginning of an error, such as "a.json is not a record".
        finite: whether to refuse NaN and infinities.

    Returns:
        The value, at most 100 levels deep.

    Raises:
        InputError: the text is not JSON, is nested deeper or takes more than 64 MiB; a name occurs twice
            in one object; or a number is not finite or is a whole number of more than 100 digits.
    """

    def constant(name):
        if finite:
            raise ValueError(f"{name} is not allowed")
        return float(name)

    def real(digits):
        return constant("Infinity") if math.isinf(float(digits)) else float(digits)

    with refusing(what):
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"it has {len(text):,} bytes, more than the {MAX_JSON_BYTES:,} allowed")
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        hooks = {"object_pairs_hook": _without_repeats, "parse_int": _whole, "parse_float": real, "parse_constant": constant}
        value = json.loads(text, **hooks)
        _check_depth(value)
        return value


def _without_repeats(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def _whole(digits):
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _check_depth(value):
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        nested = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = [inner for values in nested for inner in values]
    if level:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep")


def read_json(path, what):
    """Reads a JSON file as `parse_json` does.

    Raises:
        InputError: as in `parse_json`.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1), what)


@contextlib.contextmanager
def open_zip(path):
    """Opens a zip for reading, after checking its list of members.

    Args:
        path: the file, a `pathlib.Path`.

    Yields:
        A `zipfile.ZipFile`.

    Raises:
        InputError: the zip is damaged; a member has a path that leads out of the folder, is a link or a device, is
            encrypted, is packed by a rare method or occurs twice; or all would unpack to more than `unpacked_limit`.
    """
    with refusing(f"{path} is damaged or not a zip file", "copy it again"):
        archive = zipfile.ZipFile(path)
    with archive:
        check_members(archive.infolist(), path)
        yield archive


def check_members(members, path):
    """Raises the InputErrors of `open_zip` for a list of `zipfile.ZipInfo`."""
    names = set()
    for member in members:
        name, parts = member.filename, re.split(r"[/\\]", member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)  # 0 if the zip was made on a system without modes
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise InputError(f"{path} holds {name[:300]!r}, which leads out of the folder it is unpacked to.")
        if "\\" in name or name in names or any(len(part.encode()) > 200 for part in parts):
            raise InputError(f"{path} holds {name[:300]!r}, which occurs twice, has a backslash or is too long: pack it again.")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise InputError(f"{path} holds {name!r}, which is a link or a device: only files are unpacked.")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{path} cannot be unpacked: pack it again without encryption, with the method deflate.")
        names.add(name)
    size, limit = sum(member.file_size for member in members), unpacked_limit(path.stat().st_size)
    if size > limit:
        raise InputError(f"{path} would unpack to {size:,} bytes, more than the {limit:,} allowed for its size.")


def h5_shapes(file, size):
    """Returns the shape of each array in an HDF5 file by name, without reading any array.

    Args:
        file: an open `h5py.File`.
        size: its bytes.

    Raises:
        ValueError: the file has a link, an array stored in another file, an array without numbers, or
            arrays that would unpack to more than `unpacked_limit`.
    """
    shapes, claimed = {}, 0

    def wrong_with(name, item):  # returns the error, which ends the visit: h5py loses exceptions
        nonlocal claimed
        if not isinstance(item, h5py.Dataset):
            return None
        no_numbers = item.shape is None or not (item.dtype.kind in "fiub" or item.dtype == BFLOAT16)
        if item.is_virtual or item.external or no_numbers:
            return f"{name!r} lies in another file or holds no numbers"
        claimed += item.dtype.itemsize * max(math.prod(item.shape), math.prod(item.chunks or ()))
        claimed += sum(item.attrs.get_id(key).get_storage_size() for key in item.attrs)
        if claimed > unpacked_limit(size):
            return f"its arrays would unpack to more than the {unpacked_limit(size):,} bytes allowed for its size"
        shapes[name] = item.shape
        return None

    wrong = file.visititems_links(lambda name, link: None if isinstance(link, h5py.HardLink) else f"{name!r} is a link")
    wrong = wrong or file.visititems(wrong_with)
    if wrong:
        raise ValueError(wrong)
    return shapes


@contextlib.contextmanager
def variables_within(limit, what):
    """Stops the building of models inside the block before their variables take more than `limit` bytes.

    Args:
        limit: in bytes; infinite for no limit.
        what: the beginning of the error.

    Raises:
        InputError: the variables would take more.
    """
    if limit == math.inf or keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf  # imported here, so that the rest works on Keras' other backends

    taken, last = 0, None

    def creator(make, **options):
        nonlocal taken, last
        value = options["initial_value"]
        if value is not last:  # TensorFlow calls this twice for one variable
            last = value
            with tf.Graph().as_default():  # finds the shape without computing the numbers
                tensor = value() if callable(value) else value
                tensor = tensor if tf.is_tensor(tensor) else tf.convert_to_tensor(tensor, options["dtype"])
            taken += tensor.shape.num_elements() * tensor.dtype.size
        if taken > limit:
            raise InputError(f"{what} more numbers than a file of its size can hold: use another copy.")
        return make(**options)

    with tf.variable_creator_scope(creator):
        yield
