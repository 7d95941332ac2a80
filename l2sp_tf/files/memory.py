"""Memory: that NumPy arrays and TensorFlow tensors share, and how much there is."""

import os
import sys

import numpy as np

ALIGNMENT = 64  # bytes: TensorFlow aborts the process if shared memory is not aligned to them


def aligned_copy(value, dtype=None):
    """Copies an array to memory that a tensor can share."""
    array = np.asarray(value, dtype)
    buffer = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    padding = -buffer.ctypes.data % ALIGNMENT
    copy = buffer[padding : padding + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def shared_tensor(array):
    """Returns a CPU tensor that shares the array's memory, or a copy if it cannot; do not write to either."""
    import tensorflow as tf  # imported here, because anchors also work on Keras' other backends

    is_aligned = array.size and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0
    if not is_aligned or array.dtype.kind not in "fiu":
        return tf.convert_to_tensor(array)
    view = array.view()
    try:
        view.flags.writeable = True  # DLPack refuses read-only arrays
    except ValueError:  # the memory itself is read-only
        return tf.convert_to_tensor(array)
    return tf.experimental.dlpack.from_dlpack(view.__dlpack__())


def physical_memory():
    """Returns the size of this machine's memory in bytes, or a huge number where the system does not say."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
