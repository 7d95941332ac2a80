"""Arrays and TensorFlow's tensors that share memory."""

import numpy as np

ALIGNMENT = 64  # bytes: TensorFlow stops the process when it meets shared memory that starts elsewhere


def aligned_copy(value, dtype=None):
    """A copy of an array in memory that a tensor can share."""
    array = np.asarray(value, dtype)
    buffer = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def shared_tensor(array):
    """A tensor on the CPU that shares the memory of an array, or a copy where it cannot; nobody may write to either."""
    import tensorflow as tf  # here, since the anchors serve Keras' other backends too

    is_aligned = array.size and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0
    if not is_aligned or array.dtype.kind not in "fiu":
        return tf.convert_to_tensor(array)
    view = array.view()
    try:
        view.flags.writeable = True  # DLPack passes on nothing that is read-only
    except ValueError:  # what lies below is read-only too
        return tf.convert_to_tensor(array)
    return tf.experimental.dlpack.from_dlpack(view.__dlpack__())
