"""Measures a training step with each penalty against the same step without any.

A step is Keras' own: forward and backward pass, value and gradient of the penalty, SGD with momentum,
and the averages of batch norm, on one batch that stays on the device. The penalties are attached to all
weights. All steps take turns in one process on the same model; the last lines give the median of the
paired ratios and their spread (10th and 90th percentile). The row "none, again" is the same step
without a penalty a second time: what it is off 1 is the error of the measurement.

    python -m benchmarks.penalties --network=resnet50 --batch=16
    python -m benchmarks.penalties --network=small --image_size=8 --batch=64 --rounds=200
    python -m benchmarks.penalties --jit_compile=on --precision=mixed_float16     # as on a GPU
    KERAS_BACKEND=jax python -m benchmarks.penalties --network=resnet50 --batch=64

The last is for a machine where TensorFlow cannot be installed, and measures something else: the same
regularizers and `attach` on Keras' JAX backend, by `train_on_batch`, whose bookkeeping in Python is in every
step. The rest of the package (images, recipes' runs, Fisher, records) needs TensorFlow and is not run.
"""

import argparse

import keras
import numpy as np

import l2sp_tf as l2sp
from benchmarks.common import machine, paired_times, spread, table
from l2sp_tf.models.zoo import BACKBONES, backbone
from l2sp_tf.penalties.formulas import PENALTIES, FisherPenalty

TARGETS = {"l2": 1.01, "l2_sp": 1.01, "l2_sp_fisher": 1.01, "l1_sp": 1.02, "gl_sp": 1.02, "gl_sp_fisher": 1.02}
JIT = {"on": True, "off": False, "auto": "auto"}


def batch_of(model, batch):
    """Random images and classes for a model, on its device."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, *model.input_shape[1:])).astype("float32")
    labels = rng.integers(model.output_shape[-1], size=batch).astype("int32")
    return keras.ops.convert_to_tensor(images), keras.ops.convert_to_tensor(labels)


def compiled(model, *, fused=True, jit_compile="auto"):
    """The model, compiled with the batch norm that `finetune` gives it, or with Keras' own, for SGD with momentum.

    The rate is tiny: the times of all steps are those of the same weights, or nearly so.
    """
    if fused:
        l2sp.fuse_batch_norm(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-6, momentum=0.9), loss, jit_compile=jit_compile)
    return model


def step_of(model, images, labels):
    """A function that runs one training step of a compiled model with the penalties that it carries now."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        function = tf.function(model.train_step, jit_compile=bool(model.jit_compile)).get_concrete_function((images, labels))
        step = lambda: float(function((images, labels))["loss"])  # noqa: E731
    else:
        model.train_function = None
        model.make_train_function()
        function = model.train_function

        def step():
            model.train_function = function
            return float(np.asarray(model.train_on_batch(images, labels)))

    step()  # traced now, while the penalties are those that were attached
    return step


def steps(pretrained, symbols, batch, jit_compile="auto"):
    """The steps of one model without a penalty, with each penalty named, and without one again."""
    anchors = l2sp.Anchors.of(pretrained)
    fisher = {key: np.ones_like(anchor) for key, anchor in anchors.items()}
    model = compiled(l2sp.with_new_head(pretrained, 120, say=lambda line: None), jit_compile=jit_compile)
    images, labels = batch_of(model, batch)
    found = {"none": step_of(model, images, labels)}
    for symbol in symbols:
        needed = {"fisher": fisher} if issubclass(PENALTIES[symbol], FisherPenalty) else {}
        l2sp.attach(model, PENALTIES[symbol](0.1), anchors, params="all", **needed)
        found[symbol] = step_of(model, images, labels)
    return {**found, "none, again": found["none"]}


def parser_of(document):
    """A parser of the arguments for a network, its images and the number of rounds."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--network", choices=BACKBONES, default="resnet50")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    return parser


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--penalties", default=",".join(PENALTIES))
    parser.add_argument("--jit_compile", choices=JIT, default="auto")
    parser.add_argument("--precision", default="float32", help="a dtype policy of Keras, such as mixed_float16")
    arguments = parser.parse_args()
    keras.config.set_dtype_policy(arguments.precision)
    symbols = [symbol for symbol in arguments.penalties.split(",") if symbol]
    pretrained = backbone(arguments.network, 1000, image_size=arguments.image_size)
    found = steps(pretrained, symbols, arguments.batch, JIT[arguments.jit_compile])
    times = paired_times(list(found.values()), arguments.rounds)
    size = f"{pretrained.count_params():,} parameters, {arguments.image_size} pixels, batch {arguments.batch}"
    how = f"{arguments.precision}, jit_compile {arguments.jit_compile}, {keras.backend.backend()}, {arguments.rounds} rounds"
    print(f"{machine()}\n{arguments.network}, {size}, {how}")
    rows = [
        [symbol, f"{1e3 * np.median(column):.2f}", spread(column / times[:, 0]), TARGETS.get(symbol, "")]
        for symbol, column in zip(found, times.T, strict=True)
    ]
    print(table(["penalty", "ms a step", "over none", "goal, at most"], rows))


if __name__ == "__main__":
    main()
