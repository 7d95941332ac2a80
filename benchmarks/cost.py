"""Counts the floating-point operations of one training step with each penalty against those with none.

The paper: "L2-SP increases the number of floating point operations of ResNet-101 by less than 1%"
(section 4.4). A step is Keras' own: forward and backward pass, value and gradient of the penalty,
SGD with momentum, and the averages of batch norm. It is traced and never run; each operation in its
graph that the step needs is counted by its shapes. The penalties are attached to all weights.

    python -m benchmarks.cost
    python -m benchmarks.cost --network=small --image_size=32 --batch=8
"""

import argparse
import collections
import math

import keras
import numpy as np
import tensorflow as tf

import l2sp_tf as l2sp
from l2sp_tf.models.zoo import BACKBONES, backbone
from l2sp_tf.penalties.formulas import PENALTIES, FisherPenalty


def _per_output(operations):
    return lambda op: operations * _size(op.outputs[0])


def _convolution(result, kernel):
    """Two operations for each product: 2 (elements of the layer's output) (fan-in of one of its channels)."""
    return lambda op: 2 * _size(result(op)) * _size(kernel(op)) // kernel(op).shape[-1]


# The floating-point operations of a node. Comparisons, choices and roots count as one, products with the
# border of "same" padding as products, and moving or renaming numbers as none.
RULES = {
    **dict.fromkeys(["Abs", "AddV2", "BiasAdd", "Mul", "Neg", "Sign", "Square", "Sub"], _per_output(1)),
    **dict.fromkeys(["DivNoNan", "Greater", "Less", "RealDiv", "Relu", "ReluGrad", "Rsqrt", "SelectV2", "Sqrt"], _per_output(1)),
    **dict.fromkeys(["SquaredDifference", "SqrtGrad"], _per_output(2)),
    "RsqrtGrad": _per_output(4),
    **dict.fromkeys(["Sum", "Mean", "BiasAddGrad"], lambda op: _size(op.inputs[0])),
    "L2Loss": lambda op: 2 * _size(op.inputs[0]),
    "AddN": lambda op: (len(op.inputs) - 1) * _size(op.outputs[0]),
    "AssignAddVariableOp": lambda op: _size(op.inputs[1]),
    # largest logit, difference, exp, sum, quotient, minus the label
    "SparseSoftmaxCrossEntropyWithLogits": lambda op: 6 * _size(op.inputs[0]),
    "MaxPool": lambda op: math.prod(op.get_attr("ksize")) * _size(op.outputs[0]),
    "MaxPoolGrad": lambda op: (math.prod(op.get_attr("ksize")) + 1) * _size(op.inputs[2]),  # looks for the largest again
    "MatMul": lambda op: 2 * _size(op.outputs[0]) * op.inputs[0].shape[0 if op.get_attr("transpose_a") else 1],
    "Conv2D": _convolution(lambda op: op.outputs[0], lambda op: op.inputs[1]),
    "Conv2DBackpropInput": _convolution(lambda op: op.inputs[2], lambda op: op.inputs[1]),
    "Conv2DBackpropFilter": _convolution(lambda op: op.inputs[2], lambda op: op.outputs[0]),
    **dict.fromkeys(["Cast", "Const", "Identity", "IdentityN", "Placeholder", "Snapshot", "StopGradient"], lambda op: 0),
    **dict.fromkeys(["BroadcastTo", "ExpandDims", "Pack", "Pad", "Reshape", "Slice", "Squeeze", "Tile"], lambda op: 0),
    **dict.fromkeys(["AssignVariableOp", "ReadVariableOp", "ShapeN", "StridedSlice", "Unpack"], lambda op: 0),
}


def operations(op):
    """The floating-point operations of one node of a graph, or None where there is no rule for it."""
    if not any(tensor.dtype.is_floating or tensor.dtype == tf.resource for tensor in (*op.inputs, *op.outputs)):
        return 0
    return RULES[op.type](op) if op.type in RULES else None


def _size(tensor):
    if not tensor.shape.is_fully_defined():
        raise ValueError(f"{tensor.name} has the shape {tensor.shape}, but only known shapes can be counted: trace with them.")
    return tensor.shape.num_elements()


def count(graph):
    """Adds up the operations that the outputs and the effects of a traced function need.

    Args:
        graph: of a concrete function.

    Returns:
        A pair of dicts: operations by kind of node; and how many nodes of each kind had no rule.
    """
    totals, unknown = collections.Counter(), collections.Counter()
    todo = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    seen = set(todo)
    while todo:
        op = todo.pop()
        number = operations(op)
        if number is None:
            unknown[op.type] += 1
        else:
            totals[op.type] += number
        needed = {*(tensor.op for tensor in op.inputs), *op.control_inputs} - seen
        seen |= needed
        todo.extend(needed)
    return {kind: number for kind, number in totals.items() if number}, dict(unknown)


def training_step(model, batch):
    """The graph of a training step of a compiled Keras model on a batch of images and their classes."""
    images = tf.TensorSpec((batch, *model.input_shape[1:]), "float32")
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return tf.function(model.train_step).get_concrete_function((images, tf.TensorSpec((batch,), "int32"))).graph


def costs(pretrained, num_classes=120, batch=64):
    """Counts a training step of a fine-tuned model with no penalty and with each of the six.

    Args:
        pretrained: a classifier, as for `l2sp_tf.with_new_head`.
        num_classes: of the target task.
        batch: images in a step.

    Returns:
        A dict from "none" and each penalty's symbol to a dict: "operations" of a step, "extra"
        operations over "none", the "percent" that these are of it, and the nodes "uncounted" for
        want of a rule.
    """
    anchors = l2sp.Anchors.of(pretrained)
    fisher = {key: np.ones_like(anchor) for key, anchor in anchors.items()}
    model = l2sp.with_new_head(pretrained, num_classes, say=lambda line: None)
    model.compile(l2sp.Recipe().optimizer(), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    found = {}
    for symbol, penalty in {"none": None, **PENALTIES}.items():
        if penalty is not None:
            needed = {"fisher": fisher} if issubclass(penalty, FisherPenalty) else {}
            l2sp.attach(model, penalty(0.1), anchors, params="all", **needed)
        totals, unknown = count(training_step(model, batch))
        number = sum(totals.values())
        extra = number - found["none"]["operations"] if found else 0
        percent = 100 * extra / found["none"]["operations"] if found else 0.0
        found[symbol] = {"operations": number, "extra": extra, "percent": percent, "uncounted": unknown}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=BACKBONES, default="resnet101")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    found = costs(backbone(arguments.network, 1000, image_size=arguments.image_size), batch=arguments.batch)
    print(f"{arguments.network}, {arguments.image_size} pixels, batch {arguments.batch}")
    print("| penalty | GFLOP a step | extra GFLOP | extra |\n| --- | --- | --- | --- |")
    for symbol, row in found.items():
        print(f"| {symbol} | {row['operations'] / 1e9:.3f} | {row['extra'] / 1e9:.3f} | {row['percent']:.4f}% |")
        if row["uncounted"]:
            print(f"not counted, for want of a rule: {row['uncounted']}")


if __name__ == "__main__":
    main()
