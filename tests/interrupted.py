"""A run that kills itself: `python interrupted.py FOLDER [step:N | write:N | term:N | then:OTHER]`.

It trains in FOLDER, and prints the step from which it resumed and the digest of its weights.
"step:N" is kill -9 after step N, "write:N" at the N-th flush of a file to the disk, in the middle
of a save; "term:N" is SIGTERM in step N. Steps are counted from where this process resumed.
"then:OTHER" is no interruption: when the run is over, another one follows in the folder OTHER.
"""

import os
import pathlib
import signal
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import l2sp_tf as l2sp
from l2sp_tf.data import Dataset, Split

RECIPE = l2sp.Recipe().replace(iterations=30, batch_size=8, resize=10, crop=8, blur_kernel=3, log_every=4)
EVERY = 5


def network():
    """A small ResNet with dropout."""
    from l2sp_tf.models.resnets import small_resnet

    keras.utils.set_random_seed(0)
    body = small_resnet((8, 8, 3), 4, widths=(4,), depths=(1,))
    inputs, features = body.input, body.layers[-2].output
    x = keras.layers.Dropout(0.3, name="drop")(features)
    return keras.Model(inputs, keras.layers.Dense(4, name="logits")(x))


def images():
    """45 images of 3 classes, so that batches of 8 span epochs."""
    rng = np.random.default_rng(0)
    labels = np.arange(45, dtype=np.int32) % 3
    pixels = rng.integers(0, 180, size=(45, 12, 12, 3)).astype("uint8") + np.uint8(30 * labels)[:, None, None, None]
    names = tuple(map(str, range(45)))
    return Dataset("made", ("a", "b", "c"), Split(names, labels, pixels=pixels), Split(names, labels, pixels=pixels))


def die_after(kind, number):
    """Makes this process kill itself, and returns the callbacks for that."""
    if kind == "write":
        flush, count = os.fsync, [0]

        def fsync(handle):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(handle)

        os.fsync = fsync
        return []
    signals = {"step": signal.SIGKILL, "term": signal.SIGTERM}
    die = lambda batch, logs: batch + 1 == number and os.kill(os.getpid(), signals[kind])  # noqa: E731
    return [keras.callbacks.LambdaCallback(on_train_batch_end=die)]


def main(folder, how=""):
    tf.config.experimental.enable_op_determinism()
    kind, _, number = how.partition(":")
    callbacks = die_after(kind, int(number)) if kind and kind != "then" else []
    options = {"pixels": "rgb", "run_dir": folder, "callbacks": callbacks, "checkpoint_every": EVERY, "verbose": 0}
    print("begins", flush=True)
    run = l2sp.finetune(network(), images(), l2sp.L2SP(0.1), RECIPE, **options)
    print(run.resumed_at, l2sp.Anchors.of(run.model).digest, flush=True)
    if kind == "then":
        main(number)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
