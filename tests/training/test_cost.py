"""Counts of a training step's operations, against loops, closed forms and TensorFlow's own profiler."""

import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import l2sp_tf as l2sp
from benchmarks import cost


def traced(function, *shapes):
    return tf.function(function).get_concrete_function(*(tf.TensorSpec(shape) for shape in shapes)).graph


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients_count_every_product_twice(stride):
    def gradients(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = tf.nn.conv2d(x, kernel, stride, "VALID")
        return y, *tape.gradient(y, [x, kernel])

    side = len(range(0, 7 - 3 + 1, stride))
    products = sum(1 for _ in itertools.product(range(2), range(side), range(side), range(3), range(3), range(4), range(5)))
    totals, unknown = cost.count(traced(gradients, (2, 7, 7, 4), (3, 3, 4, 5)))
    kinds = ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter")
    assert {kind: totals[kind] for kind in kinds} == dict.fromkeys(kinds, 2 * products)
    assert not unknown


def test_a_step_of_a_dense_network_in_closed_form():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(3, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    totals, unknown = cost.count(cost.training_step(model, 8))
    # forward and the kernels' gradients; the gradient of the images is not needed
    assert totals["MatMul"] == 2 * 8 * (2 * 5 * 4 + 3 * 4 * 3)
    assert totals["BiasAdd"] == totals["BiasAddGrad"] == totals["Relu"] == totals["ReluGrad"] == 8 * 4
    numbers = 5 * 4 + 4 + 4 * 3
    assert totals["Sub"] == numbers  # momentum m - rate g; the products are among "Mul"
    assert totals["AssignAddVariableOp"] == pytest.approx(numbers, abs=8)  # w + m; and a few counters
    assert totals["Mul"] == pytest.approx(2 * numbers + 8 * 3, abs=40)
    assert not unknown


def test_the_forward_pass_agrees_with_the_profiler_of_tensorflow(small_network):
    model = small_network()
    graph = traced(lambda x: model(x, training=True), (4, 6, 6, 3))
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    profile = tf.compat.v1.profiler.profile(graph, cmd="op", options={**options, "output": "none"})
    theirs = {}
    while profile.children:  # each kind of node is the child of the one before
        profile = profile.children[0]
        theirs[profile.name] = profile.float_ops
    ours, _ = cost.count(graph)
    kinds = ("AddV2", "BiasAdd", "Conv2D", "MatMul", "Mean", "Mul", "SquaredDifference", "Sub")
    assert {kind: ours[kind] for kind in kinds} == {kind: theirs[kind] for kind in kinds}


def test_unneeded_nodes_are_not_counted():
    def function(x):
        tf.matmul(x, x)
        return tf.square(x)

    assert cost.count(traced(function, (3, 3))) == ({"Square": 9}, {})


def test_nodes_without_a_rule_are_listed():
    inner = tf.function(lambda x: x @ x)
    totals, unknown = cost.count(traced(lambda x: tf.sin(tf.linalg.cholesky(x) + inner(x)), (3, 3)))
    assert totals == {"AddV2": 9}
    assert unknown == {"Sin": 1, "Cholesky": 1, "PartitionedCall": 1}


def test_whole_numbers_are_not_counted():
    graph = tf.function(lambda n: n * n + 1).get_concrete_function(tf.TensorSpec((5,), "int32")).graph
    assert cost.count(graph) == ({}, {})


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(None, 3\)"):
        cost.count(traced(tf.square, (None, 3)))


def test_each_penalty_costs_a_few_operations_a_weight_whatever_the_batch(small_network):
    pretrained = small_network()
    shapes = {key: anchor.shape for key, anchor in l2sp.Anchors.of(pretrained).items() if "moving" not in key}
    shared = {key: shape for key, shape in shapes.items() if not key.startswith("predictions")}
    n = sum(math.prod(shape) for shape in shared.values())
    new = (5 + 1) * 7  # the new head's kernel [5, 7] and bias
    groups = sum(shape[-1] for shape in shared.values())
    found = cost.costs(pretrained, num_classes=7, batch=2)
    again = cost.costs(pretrained, num_classes=7, batch=3)
    # d = w - w0, times the root of F_jj, square and sum; the gradient of each but the sum; and once added to that of the loss
    weights = {"l2": 4, "l2_sp": 5, "l2_sp_fisher": 7, "l1_sp": 6, "gl_sp": 6, "gl_sp_fisher": 8}
    assert list(found) == ["none", *weights]
    for symbol, each in weights.items():
        row = found[symbol]
        rest = row["extra"] - each * n - 4 * new
        assert 0 <= rest <= 6 * (len(shared) + 2) + (12 * groups if symbol.startswith("gl") else 0), symbol
        assert row["extra"] == again[symbol]["extra"]
        assert row["operations"] == found["none"]["operations"] + row["extra"]
        assert row["percent"] == pytest.approx(100 * row["extra"] / found["none"]["operations"])
        assert not row["uncounted"]
    assert again["none"]["operations"] > 1.3 * found["none"]["operations"]


def test_the_command_prints_a_row_for_each_penalty(small_network, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cost", "--network=small", "--image_size=6", "--batch=2"])
    monkeypatch.setattr(cost, "backbone", lambda name, classes, image_size: small_network(classes))
    monkeypatch.delitem(cost.RULES, "Sign")
    cost.main()
    lines = capsys.readouterr().out.splitlines()
    assert "small, 6 pixels, batch 2" in lines[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:] if line.startswith("| ")]
    assert [row[0] for row in rows] == ["none", "l2", "l2_sp", "l2_sp_fisher", "l1_sp", "gl_sp", "gl_sp_fisher"]
    extra = np.array([float(row[3].rstrip("%")) for row in rows])
    assert extra[0] == 0 and np.all(extra[1:] > 0)
    uncounted = [number for number, line in enumerate(lines) if "want of a rule: {'Sign': " in line]
    # of L1-SP, and of the groups of one weight
    assert [lines[number - 1].split()[1] for number in uncounted] == ["l1_sp", "gl_sp", "gl_sp_fisher"]
