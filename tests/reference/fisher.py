"""The Fisher diagonal by brute force: one image and one class at a time, in float64."""

import numpy as np
import tensorflow as tf

from l2sp_tf.penalties.weights import keyed_weights


def log_gradients(model, image, softmax=False):
    """The probabilities f_k(x) [K] of one image, and for each weight d log f_k(x) / dw [K, *shape].

    Args:
        model: a model of policy float64.
        image: [1, ...].
        softmax: whether the model ends in a softmax.
    """
    keys = {id(weight.variable): key for key, weight in keyed_weights(model).items()}
    with tf.GradientTape(persistent=True) as tape:
        output = model(image, training=False)[0]
        log_f = tf.math.log(output) if softmax else tf.nn.log_softmax(output)
        classes = tf.unstack(log_f)
    variables = model.trainable_variables
    rows = [tape.gradient(log_f_k, [variable.value for variable in variables]) for log_f_k in classes]
    gradients = {}
    for variable, *columns in zip(variables, *rows, strict=True):
        columns = [np.zeros(variable.shape) if column is None else tf.convert_to_tensor(column).numpy() for column in columns]
        gradients[keys[id(variable)]] = np.stack(columns)
    return np.exp(log_f.numpy()), gradients


def fisher_diagonal(model, images, softmax=False):
    """F_jj = 1/m sum_i sum_k f_k(x_i) (d log f_k(x_i) / dw_j)^2: the unnumbered equation of section 3."""
    total = {}
    for i in range(len(images)):
        f, gradients = log_gradients(model, images[i : i + 1], softmax)
        for key, gradient in gradients.items():
            for k in range(len(f)):
                total[key] = total.get(key, 0) + f[k] * gradient[k] ** 2
    return {key: value / len(images) for key, value in total.items()}


def one_draw_variances(model, images):
    """The variance of the one-draw estimates of F_jj by signs and by labels, two dicts from key to array.

    With q_k = f_k (d log f_k / dw_j)^2 / F the share of class k in the F of one image, the variance
    is 2 F^2 (1 - sum_k q_k^2) with random signs and F^2 (sum_k q_k^2 / f_k - 1) with drawn labels;
    the mean over m images has the sum of theirs over m^2.
    """
    signs, labels = {}, {}
    for i in range(len(images)):
        f, gradients = log_gradients(model, images[i : i + 1])
        for key, gradient in gradients.items():
            f_k = f.reshape(-1, *[1] * (gradient.ndim - 1))
            shares = f_k * gradient**2  # q_k F
            total = shares.sum(0)
            signs[key] = signs.get(key, 0) + 2 * (total**2 - (shares**2).sum(0)) / len(images) ** 2
            labels[key] = labels.get(key, 0) + ((shares**2 / f_k).sum(0) - total**2) / len(images) ** 2
    return signs, labels
