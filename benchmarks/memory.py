"""Measures how much more memory a training takes with a penalty than without, at its peak.

Each training is a process of its own: a ResNet, its pre-trained twin and the anchors (which `finetune`
holds whatever the penalty), and some of Keras' own steps. The growth of the peak over the process without
a penalty is given in copies of S, the penalised weights. "none, again" shows the error of the measurement.

    python -m benchmarks.memory
    python -m benchmarks.memory --network=resnet101 --penalties=l2,l2_sp,l2_sp_fisher,l1_sp,gl_sp,gl_sp_fisher
"""

import argparse
import multiprocessing
import resource

from benchmarks.common import machine, table

TARGETS = {"l2": 0, "l2_sp": 1, "l2_sp_fisher": 2, "l1_sp": 1, "gl_sp": 1, "gl_sp_fisher": 2}


def peak(network, symbol, batch, results):
    """Trains for some steps with a penalty, or None; for a process of its own. Puts its peak and the size of S, in bytes."""
    import numpy as np

    import l2sp_tf as l2sp
    from benchmarks.penalties import batch_of, compiled, step_of
    from l2sp_tf.models.zoo import backbone
    from l2sp_tf.penalties.formulas import PENALTIES, FisherPenalty

    pretrained = backbone(network, 1000)
    anchors = l2sp.Anchors.of(pretrained)
    model = l2sp.with_new_head(pretrained, 120, say=lambda line: None)
    if symbol is not None:
        needed = (
            {"fisher": {k: np.ones_like(a) for k, a in anchors.items()}} if issubclass(PENALTIES[symbol], FisherPenalty) else {}
        )
        l2sp.attach(model, PENALTIES[symbol](0.1), anchors, params="all", **needed)
        del needed
    step = step_of(compiled(model), *batch_of(model, batch))
    for _ in range(3):
        step()
    shared = sum(4 * int(np.prod(v.shape)) for v in model.trainable_variables[:-2])  # all but the head's
    results.put((1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, shared))


def peak_of_a_process(*arguments):
    """`peak` from a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=peak, args=(*arguments, results))
    child.start()
    found = results.get()
    child.join()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--penalties", default="l2_sp,l2_sp_fisher")
    arguments = parser.parse_args()
    alone, shared = peak_of_a_process(arguments.network, None, arguments.batch)
    print(f"{machine()}\n{arguments.network}, 224 pixels, batch {arguments.batch}, S has {shared / 2**20:.0f} MiB")
    rows = [["none", f"{alone / 2**20:.0f}", "", ""]]
    for symbol in ["none, again", *arguments.penalties.split(",")]:
        found, _ = peak_of_a_process(arguments.network, None if symbol == "none, again" else symbol, arguments.batch)
        rows.append([symbol, f"{found / 2**20:.0f}", f"{(found - alone) / shared:.2f}", TARGETS.get(symbol, "")])
    print(table(["penalty", "peak, MiB", "over none, copies of S", "goal, at most"], rows))


if __name__ == "__main__":
    main()
