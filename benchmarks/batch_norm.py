"""Measures a training step with `fuse_batch_norm` against the same step with Keras' own batch norm.

Both are steps of L2-SP on all weights, as in benchmarks.penalties, and take turns in one process. The last line
gives the median of the paired ratios and their spread (10th and 90th percentile).

    python -m benchmarks.batch_norm --network=resnet50 --batch=16
    python -m benchmarks.batch_norm --network=small --image_size=8 --batch=64 --rounds=300
"""

import argparse

import keras

import l2sp_tf as l2sp
from benchmarks.common import machine, paired_times, spread
from benchmarks.penalties import batch_of, step_of
from l2sp_tf.models import BACKBONES, backbone


def steps(pretrained, batch):
    """A step with Keras' batch norm and one with the fused one, each of a copy of a model."""
    anchors, found = l2sp.Anchors.of(pretrained), []
    for fused in (False, True):
        model = l2sp.with_new_head(pretrained, 120, seed=0)
        l2sp.attach(model, l2sp.L2SP(0.1), anchors, params="all")
        if fused:
            l2sp.fuse_batch_norm(model)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-6, momentum=0.9), loss, jit_compile=False)
        found.append(step_of(model, *batch_of(model, batch)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=BACKBONES, default="resnet50")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    pretrained = backbone(arguments.network, 1000, image_size=arguments.image_size)
    times = paired_times(steps(pretrained, arguments.batch), arguments.rounds)
    print(f"{machine()}\n{arguments.network}, {arguments.image_size} pixels, batch {arguments.batch}, {arguments.rounds} rounds")
    print(f"fused over Keras' batch norm: {spread(times[:, 1] / times[:, 0])} of the time of a step")


if __name__ == "__main__":
    main()
