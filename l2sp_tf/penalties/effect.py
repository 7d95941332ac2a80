"""Detects which penalties take part in a training step: by their gradient, or by the step of an optimizer.

Each penalty's value passes through an identity operation of TensorFlow. If the value is part of the loss, the gradient of
the loss calls the gradient of that operation, which records the penalty. This works for any `train_step`. On other Keras
backends nothing is recorded.
"""

import contextlib
import contextvars
import functools
import weakref

import keras

_apart = contextvars.ContextVar("apart", default=False)  # per thread: each replica has its own
# graph -> penalties whose gradient was taken while it was traced
_in_gradient: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_watches: weakref.WeakSet = weakref.WeakSet()


def passed_on(penalty, value):
    """Returns the value of a penalty through an identity whose gradient records the penalty."""
    if keras.backend.backend() != "tensorflow":
        return value
    import tensorflow as tf

    _register_gradient()
    value = tf.convert_to_tensor(value)
    value._l2sp_penalty = penalty
    return tf.raw_ops.Snapshot(input=value)


@functools.cache
def _register_gradient():
    """Registers a gradient for Snapshot, an identity without one in TensorFlow; a custom gradient would never be freed."""
    import tensorflow as tf

    @tf.RegisterGradient("Snapshot")
    def gradient(operation, dy):
        penalty = getattr(operation.inputs[0], "_l2sp_penalty", None)
        if penalty is None:
            return dy
        if _apart.get():
            return None
        _in_gradient.setdefault(tf.compat.v1.get_default_graph(), weakref.WeakSet()).add(penalty)
        took_part(penalty)
        return dy


@contextlib.contextmanager
def apart():
    """Keeps the penalties out of all gradients inside the block; their values stay in the loss."""
    pop_in_gradient()  # drops records of earlier eager steps with another optimizer
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def pop_in_gradient():
    """Returns and forgets the penalties whose gradient the current step took, traced or eager."""
    import tensorflow as tf

    graph, found = tf.compat.v1.get_default_graph(), set()
    while graph is not None:
        found.update(_in_gradient.pop(graph, ()))
        outer = getattr(graph, "outer_graph", None)
        graph = outer if hasattr(outer, "outer_graph") else None  # a traced step stops below the eager context
    return found


def took_part(penalty):
    """Notifies all watches that a penalty takes part in the current step."""
    for watch in list(_watches):
        watch.seen.add(penalty)


class Watch:
    """Collects in `seen` the penalties that take part in steps, until closed or freed; inactive if `wanted` is empty."""

    def __init__(self, wanted):
        self.seen = weakref.WeakSet()
        if wanted:
            _watches.add(self)

    def close(self):
        """Ends the watch."""
        _watches.discard(self)
