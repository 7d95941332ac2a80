"""Files as torch.save writes them, made without PyTorch."""

import io
import pickle
import struct
import zipfile

import numpy as np


class _Global:
    """Something that a pickle names by module and name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Tensor:
    """A tensor for the pickle: the key of its storage, its numbers, and the shape and strides that it claims."""

    def __init__(self, key, array, legacy=False, shape=None, strides=None):
        self.key, self.array, self.legacy = key, np.asarray(array, order="C"), legacy
        self.shape = array.shape if shape is None else shape
        self.strides = tuple(s // array.itemsize for s in self.array.strides) if strides is None else strides


class _Pickler(pickle._Pickler):
    """Writes tensors as torch.save does, where there is no PyTorch."""

    def persistent_id(self, item):
        if isinstance(item, tuple) and item[:1] == ("storage",):
            return item
        return None

    def save(self, item, save_persistent_id=True):
        if isinstance(item, _Global):
            self.write(b"c" + f"{item.module}\n{item.name}\n".encode())
        elif isinstance(item, Tensor):
            kind = {"float32": "FloatStorage", "int64": "LongStorage"}[item.array.dtype.name]
            storage = ("storage", _Global("torch", kind), item.key, "cpu", item.array.size, *([None] if item.legacy else []))
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            self.write(b"(")
            for argument in (storage, 0, item.shape, item.strides, False, {}):
                self.save(argument)
            self.write(b"tR")
        else:
            super().save(item, save_persistent_id)


def pickled(item):
    file = io.BytesIO()
    _Pickler(file, 2).dump(item)
    return file.getvalue()


def torch_zip(path, state, wrap=lambda state: state):
    """Writes a state dict of arrays as torch.save does since 1.6."""
    tensors = {name: Tensor(str(i), a) for i, (name, a) in enumerate(state.items())}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(wrap(tensors)))
        archive.writestr("archive/byteorder", "little")
        for tensor in tensors.values():
            archive.writestr(f"archive/data/{tensor.key}", tensor.array.tobytes())


def torch_legacy(path, state, wrap=lambda state: state):
    """Writes a state dict of arrays as torch.save did before 1.6."""
    tensors = {name: Tensor(str(i), a, legacy=True) for i, (name, a) in enumerate(state.items())}
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [0x1950A86A20F9469CFC6C, 1001, system, wrap(tensors), [tensor.key for tensor in tensors.values()]]
    storages = [struct.pack("<q", tensor.array.size) + tensor.array.tobytes() for tensor in tensors.values()]
    path.write_bytes(b"".join([*map(pickled, parts), *storages]))
