"""The Fisher diagonal of independent Bernoulli outputs by brute force over all 2^K label vectors, in float64."""

import itertools

import numpy as np
import tensorflow as tf

from l2sp_tf.penalties.weights import keyed_weights


def log_likelihood_gradients(model, image, logits):
    """For each y in {0, 1}^K p(y | x) [2^K], and for each weight d log p(y | x) / dw [2^K, *shape].

    Args:
        model: a model of policy float64 with K outputs.
        image: [1, ...].
        logits: whether the outputs are logits; else they are probabilities.
    """
    keys = {id(weight.variable): key for key, weight in keyed_weights(model).items()}
    with tf.GradientTape(persistent=True) as tape:
        output = tf.reshape(model(image, training=False), [-1])
        log_on = -tf.math.softplus(-output) if logits else tf.math.log(output)
        log_off = -tf.math.softplus(output) if logits else tf.math.log(1 - output)
        vectors = list(itertools.product([0, 1], repeat=output.shape[0]))
        log_p = [tf.reduce_sum(tf.where(np.array(y) == 1, log_on, log_off)) for y in vectors]
    variables, gradients = model.trainable_variables, {}
    columns = [tape.gradient(one, [variable.value for variable in variables]) for one in log_p]
    for variable, *rows in zip(variables, *columns, strict=True):
        gradients[keys[id(variable)]] = np.stack([np.zeros(variable.shape) if row is None else row.numpy() for row in rows])
    return np.exp([float(one) for one in log_p]), gradients


def fisher_diagonal(model, images, logits=False):
    """F_jj = 1/m sum_i sum_y p(y | x_i) (d log p(y | x_i) / dw_j)^2."""
    total = {}
    for i in range(len(images)):
        p, gradients = log_likelihood_gradients(model, images[i : i + 1], logits)
        for key, gradient in gradients.items():
            total[key] = total.get(key, 0) + np.einsum("y,y...->...", p, gradient**2) / len(images)
    return total


def one_draw_variances(model, images, logits=False):
    """The variance of the one-draw estimates by random signs and by drawn labels, two dicts from key to array.

    Labels: the variance of (d log p(y) / dw)^2 over y. Signs: that of (sum_k eps_k sqrt(p_k (1 - p_k)) J_k)^2 over
    all 2^K sign vectors. J_k = d z_k / dw is the difference of the gradients at two y that differ in k alone.
    """
    signs, labels = {}, {}
    for i in range(len(images)):
        p, gradients = log_likelihood_gradients(model, images[i : i + 1], logits)
        count = int(np.log2(len(p)))
        on = [np.sum(p.reshape((2,) * count), axis=tuple(a for a in range(count) if a != k))[1] for k in range(count)]
        for key, gradient in gradients.items():
            mean = np.einsum("y,y...->...", p, gradient**2)
            labels[key] = labels.get(key, 0) + (np.einsum("y,y...->...", p, gradient**4) - mean**2) / len(images) ** 2
            jacobian = [gradient[1 << (count - 1 - k)] - gradient[0] for k in range(count)]
            sums = [
                sum(e * np.sqrt(q * (1 - q)) * j for e, q, j in zip(eps, on, jacobian, strict=True)) ** 2
                for eps in itertools.product([-1, 1], repeat=count)
            ]
            signs[key] = signs.get(key, 0) + np.var(sums, axis=0) / len(images) ** 2
    return signs, labels
