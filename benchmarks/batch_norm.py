"""Measures a training step with `fuse_batch_norm` against the same step with Keras' own batch norm.

Both are steps of L2-SP on all weights, as in benchmarks.penalties, and take turns in one process. The last line
gives the median of the paired ratios and their spread (10th and 90th percentile).

    python -m benchmarks.batch_norm --network=resnet50 --batch=16
    python -m benchmarks.batch_norm --network=small --image_size=8 --batch=64 --rounds=300
"""

import l2sp_tf as l2sp
from benchmarks.common import machine, paired_times, spread
from benchmarks.penalties import batch_of, compiled, parser_of, step_of
from l2sp_tf.models.zoo import backbone


def steps(pretrained, batch):
    """A step with Keras' batch norm and one with the fused one, each of a copy of a model."""
    anchors, found = l2sp.Anchors.of(pretrained), []
    for fused in (False, True):
        model = l2sp.with_new_head(pretrained, 120, seed=0, say=lambda line: None)
        l2sp.attach(model, l2sp.L2SP(0.1), anchors, params="all")
        found.append(step_of(compiled(model, fused=fused, jit_compile=False), *batch_of(model, batch)))
    return found


def main():
    arguments = parser_of(__doc__).parse_args()
    pretrained = backbone(arguments.network, 1000, image_size=arguments.image_size)
    times = paired_times(steps(pretrained, arguments.batch), arguments.rounds)
    print(f"{machine()}\n{arguments.network}, {arguments.image_size} pixels, batch {arguments.batch}, {arguments.rounds} rounds")
    print(f"fused over Keras' batch norm: {spread(times[:, 1] / times[:, 0])} of the time of a step")


if __name__ == "__main__":
    main()
