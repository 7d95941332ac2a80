"""What the tests of several machines compute: in one process for comparison, and as the program of each worker.

As a program: `python distributed_job.py SCENARIO FOLDER`, with TF_CONFIG in the environment.
"""

import os
import pathlib
import signal
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import l2sp_tf as l2sp
from l2sp_tf.data import Dataset, Split, prepare
from l2sp_tf.penalties.formulas import PENALTIES
from l2sp_tf.penalties.weights import keyed_weights
from l2sp_tf.training import devices

RECIPE = l2sp.Recipe(mean="training").replace(
    iterations=5, learning_rate=0.05, batch_size=8, resize=6, crop=5, blur="none", log_every=2
)


def network(classes=3):
    """A small network with batch norm, the same in every process."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5, 5, 3))
    x = keras.layers.Rescaling(1 / 64, name="scale")(inputs)
    x = keras.layers.Conv2D(4, 3, name="conv")(x)
    x = keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(momentum=0.9, name="bn")(x))
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(classes, name="predictions")(x), name="tiny")


def task():
    """Twenty images that are not a multiple of the batch, so that batches span epochs."""
    rng = np.random.default_rng(5)
    labels = np.arange(20, dtype=np.int32) % 2
    pixels = (rng.uniform(0, 90, size=(20, 6, 6, 3)) + 90 * labels[:, None, None, None]).astype("uint8")
    split = Split(tuple(map(str, range(20))), labels, pixels=pixels)
    return prepare(Dataset("made", ("a", "b"), split, split), RECIPE.images)


def start():
    """The pre-trained network, anchors off its weights, so that every penalty pulls from the first step, and an F_jj."""
    pretrained, rng = network(), np.random.default_rng(7)
    anchors = {key: w + rng.normal(0, 0.1, w.shape).astype("float32") for key, w in l2sp.Anchors.of(pretrained).items()}
    fisher = {key: rng.uniform(0, 2, w.shape).astype("float32") for key, w in anchors.items()}
    return pretrained, l2sp.Anchors(anchors), fisher


def finetuned(symbol, strategy=None, run_dir=None, callbacks=()):
    """The weights by key and the log of one fine-tuning under a penalty."""
    run = finetune(symbol, strategy=strategy, run_dir=run_dir, callbacks=callbacks)
    return values(run.model), run.history


def finetune(symbol, **options):
    """One fine-tuning under a penalty, with a checkpoint after every step."""
    pretrained, anchors, fisher = start()
    options |= {"anchors": anchors, "fisher": fisher if "fisher" in symbol else None, "verbose": 0, "checkpoint_every": 1}
    return l2sp.finetune(pretrained, task(), PENALTIES[symbol](0.3), RECIPE, **options)


def values(model):
    """All weights of a model by key, moving statistics too."""
    return {key: weight.variable.numpy() for key, weight in keyed_weights(model).items()}


def every_penalty(strategy, folder, index):
    for symbol in PENALTIES:
        weights, history = finetuned(symbol, strategy, folder / f"run-{symbol}")
        np.savez(folder / f"{symbol}-{index}.npz", **weights, loss=history[-1]["cross_entropy"])
    answer = devices.Devices(strategy).chief_says(lambda: index == 0)  # the others would say no
    try:
        devices.Devices(strategy).check_same_run("seed", index)
        answer = False
    except l2sp.InputError:
        pass
    (folder / f"agreed-{index}").write_text(str(answer))


def keras_fit(strategy, folder, index):
    """Runs Keras' own fit under the same strategy, and writes how it ends."""
    model = devices.Devices(strategy).replicated(network())
    with devices.Devices(strategy).scope():
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    try:
        model.fit(np.zeros((8, 5, 5, 3), "float32"), np.zeros(8), batch_size=4, verbose=0)
        message = "it trains"
    except Exception as error:  # whatever fails
        message = f"{type(error).__name__}: {error}"
    (folder / f"keras-{index}").write_text(message)


def restart(strategy, folder, index, dies_after=None):
    """A fine-tuning that resumes from its checkpoint, if any, and whose second worker may die after a step."""
    die = lambda batch, logs: index == 1 and batch + 1 == dies_after and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=die)]
    run = finetune("l2_sp", strategy=strategy, run_dir=folder / "run", callbacks=callbacks)
    np.savez(folder / f"restart-{index}.npz", **values(run.model), first=run.resumed_at)


def main(scenario, folder):
    strategy = devices.make_strategy("multiworker")
    index, _ = devices.Devices(strategy).part
    folder = pathlib.Path(folder)
    scenarios = {
        "penalties": every_penalty,
        "keras": keras_fit,
        "restart": restart,
        "die": lambda *arguments: restart(*arguments, dies_after=3),
    }
    try:
        scenarios[scenario](strategy, folder, index)
    except ConnectionError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
