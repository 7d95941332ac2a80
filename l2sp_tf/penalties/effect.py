"""What becomes of a penalty in a step: its gradient is taken, or an optimizer steps it, or neither.

Each penalty's value goes through an identity operation of TensorFlow. Whoever asks for the gradient of the loss asks that
operation too, if the value is part of the loss: so it is known, for any `train_step`, which penalties took part. On Keras'
other backends nothing is known.
"""

import contextlib
import contextvars
import functools
import weakref

import keras

_apart = contextvars.ContextVar("apart", default=False)  # for each thread: each replica has its own
# from a graph to the penalties whose gradient was taken while it was traced
_in_gradient: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_watches: weakref.WeakSet = weakref.WeakSet()


def passed_on(penalty, value):
    """Returns the value of a penalty, whose gradient tells from then on that it was asked for."""
    if keras.backend.backend() != "tensorflow":
        return value
    import tensorflow as tf

    _register_gradient()
    value = tf.convert_to_tensor(value)
    value._l2sp_penalty = penalty
    return tf.raw_ops.Snapshot(input=value)


@functools.cache
def _register_gradient():
    """Snapshot is an identity that TensorFlow itself never differentiates; a custom gradient would never be freed."""
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
    """Keeps the penalties out of the gradients that are taken within the block; their values stay in the loss."""
    pop_in_gradient()  # those of eager steps before, under another optimizer
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def pop_in_gradient():
    """Returns the penalties whose gradient was taken in the step that is traced, or run, now, and forgets them."""
    import tensorflow as tf

    graph, found = tf.compat.v1.get_default_graph(), set()
    while graph is not None:
        found.update(_in_gradient.pop(graph, ()))
        outer = getattr(graph, "outer_graph", None)
        graph = outer if hasattr(outer, "outer_graph") else None  # eager gradients are not those of a traced step
    return found


def took_part(penalty):
    """Tells those who watch that a penalty is part of the step that is traced, or run, now."""
    for watch in list(_watches):
        watch.seen.add(penalty)


class Watch:
    """Notes in `seen` which penalties take part in steps, until it is closed or forgotten; nothing if `wanted` is empty."""

    def __init__(self, wanted):
        self.seen = weakref.WeakSet()
        if wanted:
            _watches.add(self)

    def close(self):
        """Ends the watch."""
        _watches.discard(self)
