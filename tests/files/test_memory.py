"""Shared memory: a tensor shares an array's memory where that is safe, and copies it elsewhere."""

import numpy as np
import pytest

from l2sp_tf.files.memory import ALIGNMENT, aligned_copy, shared_tensor


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int64", "bool"])
def test_a_copy_is_equal_aligned_and_apart(shape, dtype):
    array = np.random.default_rng(0).integers(0, 2, size=shape).astype(dtype)
    copy = aligned_copy(array)
    assert copy.dtype == array.dtype and copy.shape == array.shape and (not copy.size or copy.ctypes.data % ALIGNMENT == 0)
    np.testing.assert_array_equal(copy, array)
    assert not np.shares_memory(copy, array)
    np.testing.assert_array_equal(shared_tensor(copy).numpy(), array)


def test_a_tensor_shares_what_is_aligned_even_if_it_is_read_only():
    array = aligned_copy(np.arange(6, dtype="float32"))
    array.flags.writeable = False
    assert np.shares_memory(np.asarray(memoryview(shared_tensor(array))), array)
    tensor = shared_tensor(array)
    del array  # the tensor keeps the memory
    np.testing.assert_array_equal(tensor.numpy(), np.arange(6))


def test_a_tensor_copies_what_it_cannot_share():
    array = aligned_copy(np.arange(12, dtype="float32").reshape(3, 4))
    for other in (array[:, :2], array.reshape(-1)[1:], np.frombuffer(bytes(64), "float32")):
        tensor = shared_tensor(other)
        np.testing.assert_array_equal(tensor.numpy(), other)
        assert not np.shares_memory(np.asarray(memoryview(tensor)), other)
