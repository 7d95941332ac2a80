"""Reads state dicts of PyTorch files without PyTorch and without running any code that a file asks for."""

import collections
import io
import math
import pathlib
import pickle
import struct
import zipfile
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import safetensors.numpy

from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import check_members, refusing

AVERAGES = ("ema", "swa", "average")  # words in the names of running averages of the weights
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in files from before PyTorch 1.6
DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("<i1"),
    "ByteStorage": np.dtype("<u1"),
    "BoolStorage": np.dtype("?"),
}


def read_state_dict(path, state=None):
    """Reads the weights in a PyTorch file: safetensors, or `torch.save` of any version.

    A training checkpoint may hold one or several state dicts under names such as "state_dict", "model" or "model_ema".
    Pickled code is never run: besides containers and numbers, a file may only name functions and classes that describe
    tensors.

    Args:
        path: the file.
        state: the name of the state dict in a checkpoint; by default the only one that is no running average (of which
            the name would say "ema", "swa" or "average"), or the only one.

    Returns:
        A dict from name to array.

    Raises:
        InputError: the file is missing, is damaged, holds no state dict or several of them to choose from, or
            asks for a function or class that describes no tensor.
    """
    return read_checkpoint(path, state)[0]


def read_checkpoint(path, state=None):
    """Reads a file as `read_state_dict` does.

    Returns:
        The dict from name to array, and a dict of what else a training checkpoint holds, such as "epoch" and "args". The flags
        of an `argparse.Namespace` are a dict.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}: give the path of a PyTorch file.")
    content = path.read_bytes()  # every size that the file claims is checked against these bytes before memory is taken
    with refusing(
        f"{path} is damaged or not a state dict of PyTorch", "save model.state_dict() with torch.save, or use another copy"
    ):
        if path.suffix == ".safetensors":
            return safetensors.numpy.load(content), {}
        found = _read_zip(path, content) if zipfile.is_zipfile(io.BytesIO(content)) else _read_legacy(content)
        states = _states(found.contents)
    tensors = states[_chosen(path, states, state)]
    others = {name: value for name, value in found.contents.items() if name not in states} if None not in states else {}
    others = {name: value.values if isinstance(value, _Flags) else value for name, value in others.items()}
    with refusing(f"{path} is damaged or no state dict of PyTorch"):
        return {name: found.array(tensor) for name, tensor in tensors.items()}, others


def _states(contents):
    """Returns the state dicts in a file's contents by name; a file that is one state dict has it under None."""
    if not isinstance(contents, dict) or not all(isinstance(name, str) for name in contents):
        raise ValueError(f"it holds a {type(contents).__name__}, not names and tensors")
    if _is_state(contents):
        return {None: contents}
    states = {name: value for name, value in contents.items() if _is_state(value)}
    if not states:
        known = next((contents[name] for name in ("state_dict", "model") if isinstance(contents.get(name), dict)), contents)
        others = [str(name) for name, value in known.items() if not isinstance(value, _Tensor)]
        raise ValueError(f"it holds {', '.join(others[:5]) or 'nothing'} besides tensors")
    return states


def _is_state(value):
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in value.items())
    )


def _chosen(path, states, state):
    """Returns the name of the state dict to read."""
    names = ", ".join(str(name) for name in states if name is not None) or "one without a name"
    if state is not None and state not in states:
        raise InputError(f"{path} has no state dict called {state!r}: it has {names}.")
    plain = [name for name in states if name is None or not any(word in name.lower() for word in AVERAGES)]
    choices = [state] if state is not None else plain or list(states)
    if len(choices) > 1:
        raise InputError(f"{path} holds several state dicts: choose one of {names} by --state.")
    return choices[0]


class _Storage(collections.namedtuple("_Storage", "key dtype count")):
    """A run of numbers in the file, as the pickle names it."""

    __slots__ = ()


class _Tensor(collections.namedtuple("_Tensor", "storage offset shape strides")):
    """A tensor as the pickle describes it: a view of a storage, counted in elements."""

    __slots__ = ()


class _DescribeTensor:
    """Stands in for the functions that rebuild a tensor: keeps their arguments."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *_):
        return _Tensor(storage, offset, shape, strides)


class _DescribeParameter:
    """Stands in for the function that rebuilds a parameter: keeps its tensor."""

    __slots__ = ()

    def __call__(self, tensor, *_):
        return tensor


class _OrderedDict:
    """Stands in for OrderedDict; keys must be strings or integers, because hashing nested tuples could take forever."""

    __slots__ = ()

    def __call__(self, pairs=()):
        return collections.OrderedDict((_key(key), value) for key, value in pairs)


class _Flags:
    """Stands in for the `argparse.Namespace` of a trainer's flags: keeps them as a dict."""

    __slots__ = ("values",)

    def __init__(self):
        self.values = {}

    def __setstate__(self, values):
        if type(values) is not dict:
            raise pickle.UnpicklingError("its flags have no names")
        self.values = values


def _key(key):
    if type(key) not in (str, int):
        raise pickle.UnpicklingError(f"it uses a {type(key).__name__} as a name")
    return key


ALLOWED = {
    ("collections", "OrderedDict"): _OrderedDict(),
    ("argparse", "Namespace"): "argparse.Namespace",  # a string, as below: only NEWOBJ makes something of it
    ("torch._utils", "_rebuild_tensor"): _DescribeTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _DescribeTensor(),
    ("torch._utils", "_rebuild_parameter"): _DescribeParameter(),
    **{("torch", name): dtype.name for name, dtype in DTYPES.items()},  # a string: a pickle cannot call it
}


# No state dict needs these: BYTEARRAY8 takes memory for any length that a file claims, the others hash or make any object.
REFUSED = (
    "BYTEARRAY8",
    "DICT",
    "EMPTY_SET",
    "ADDITEMS",
    "FROZENSET",
    "INST",
    "OBJ",
    "NEWOBJ_EX",
    "EXT1",
    "EXT2",
    "EXT4",
)


# The Python unpickler: the one in C takes memory for any memo index that a file gives.
class _Unpickler(pickle._Unpickler):
    """Unpickles containers, strings, numbers and descriptions of tensors; refuses every other name."""

    def __init__(self, file):
        super().__init__(file, encoding="latin1")  # some old files were written by Python 2
        self.itemsizes = {}  # bytes per number of each storage, by its key

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no state dict needs")
        return ALLOWED[module, name]

    def load_setitem(self):
        _key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self):
        for key in self.stack[::2]:
            _key(key)
        super().load_setitems()

    def load_refused(self):
        raise pickle.UnpicklingError("it makes objects that no state dict needs")

    def load_newobj(self):
        arguments, kind = self.stack.pop(), self.stack.pop()
        if (kind, arguments) != ("argparse.Namespace", ()):
            self.load_refused()
        self.append(_Flags())

    refused = dict.fromkeys((getattr(pickle, name)[0] for name in REFUSED), load_refused)
    own = {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.NEWOBJ[0]: load_newobj}
    dispatch: ClassVar[Any] = {**pickle._Unpickler.dispatch, **refused, **own}

    def persistent_load(self, pid):
        kind, dtype, key, _location, count, *view = pid
        known = type(kind) is type(dtype) is str and kind == "storage" and dtype in {d.name for d in DTYPES.values()}
        if not known or any(v is not None for v in view):
            raise pickle.UnpicklingError("it refers to something other than a storage of numbers")
        storage = _Storage(str(_key(key)), np.dtype(getattr(ml_dtypes, dtype, dtype)), count)
        self.itemsizes[storage.key] = storage.dtype.itemsize
        return storage


class _Found:
    """A file's contents: the unpickled objects, and the bytes of each storage by its key."""

    def __init__(self, contents, storages):
        self.contents, self._storages = contents, storages

    def array(self, tensor):
        """Returns a tensor's array, a view of the file's bytes."""
        storage, offset, shape, strides = tensor
        numbers = (storage.count, offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
            raise ValueError("a tensor has impossible sizes")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        count = math.prod(shape)
        if count and (last >= storage.count or count > storage.count):
            raise ValueError("a tensor reaches beyond its storage")
        raw, dtype = self._storages[storage.key], storage.dtype
        if len(raw) != storage.count * dtype.itemsize:
            raise ValueError(f"the storage {storage.key} has {len(raw)} bytes, not {storage.count} times {dtype.itemsize}")
        flat = np.frombuffer(raw, dtype)[offset:]
        return np.lib.stride_tricks.as_strided(flat, shape, [dtype.itemsize * s for s in strides], writeable=False)


def _read_zip(path, content):
    """Reads the format since PyTorch 1.6: a zip of data.pkl and one uncompressed file for each storage."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        check_members(archive.infolist(), path)
        members = {info.filename: info for info in archive.infolist()}
        sizes = [info.file_size for info in archive.infolist()]
        if sum(sizes) > len(content) or any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise ValueError("its members are compressed or overlap")
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in members and archive.read(f"{prefix}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        contents = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
        folder = f"{prefix}data/"
        storages = {name.removeprefix(folder): archive.read(name) for name in members if name.startswith(folder)}
    return _Found(contents, storages)


def _read_legacy(content):
    """Reads the format before PyTorch 1.6: pickles (magic number, version, system, contents, storage keys), then the storages."""
    file = io.BytesIO(content)
    if _Unpickler(file).load() != MAGIC:
        raise ValueError("it does not begin with PyTorch's magic number")
    _Unpickler(file).load()  # the version
    if not _Unpickler(file).load()["little_endian"]:
        raise ValueError("its numbers are big-endian")
    unpickler = _Unpickler(file)
    contents, keys = unpickler.load(), _Unpickler(file).load()
    place, storages = file.tell(), {}
    for key in [str(_key(key)) for key in keys]:
        (count,) = struct.unpack_from("<q", content, place)
        end = place + 8 + count * unpickler.itemsizes[key]
        if count < 0 or end > len(content):
            raise ValueError(f"the storage {key} reaches beyond the end of the file")
        storages[key] = memoryview(content)[place + 8 : end]
        place = end
    return _Found(contents, storages)
