"""Measures how much of the pre-trained features survives: R² between activations before and after fine-tuning (Fig. 4)."""

import keras
import numpy as np
import tensorflow as tf
from matplotlib.cbook import boxplot_stats

from l2sp_tf.files.errors import InputError
from l2sp_tf.models.units import graph_of, nodes_of, units

BOX = ("whislo", "q1", "med", "q3", "whishi")  # the names that `matplotlib.axes.Axes.bxp` takes


def activation_r2(finetuned, pretrained, images, *, layers=None):
    """Measures R² between each feature's activations before and after fine-tuning (Fig. 4).

    R² = cov(a, b)² / (var(a) var(b)), over all images and positions: the share of a feature's variance that a linear
    function of its pre-trained self explains. The sums are streamed in float64; no activation is stored.

    Args:
        finetuned, pretrained: two functional models. The compared layers have the same names and shapes in both; they may
            lie in nested models.
        images: an iterable of float32 [b, h, w, c], or of tuples that begin with them. It is read once.
        layers: the names of the layers to compare; by default the last layer of each unit (`units.units`): the first
            convolution and each block.

    Returns:
        A dict from layer to float64 [channels]; NaN for a feature that is constant in either model.

    Raises:
        InputError: a layer is missing from a model, or there are no images.
    """
    layers = [unit[-1].name for unit in units(pretrained)] if layers is None else list(layers)
    extract = [_features(model, layers) for model in (pretrained, finetuned)]
    sums = moments = None
    for batch in images:
        x = tf.cast(batch[0] if isinstance(batch, (tuple, list)) else batch, tf.float32)
        if moments is None:
            moments = _moments(extract, x)
        added = moments(x)
        sums = added if sums is None else [old + new for old, new in zip(sums, added, strict=True)]
    if sums is None:
        raise InputError("There are no images to compare activations on.")
    return {name: _r2(total.numpy()) for name, total in zip(layers, sums, strict=True)}


def box(values):
    """Computes the box of a box plot of R² values: quartiles, and whiskers of at most 1.5 times the box.

    Args:
        values: [n], NaN for undefined ones.

    Returns:
        {"whislo", "q1", "med", "q3", "whishi": float, or None if no value is defined; "features": n,
        "undefined": the number of NaN}.
    """
    values = np.asarray(values, np.float64)
    defined = values[~np.isnan(values)]
    (stats,) = boxplot_stats(defined)
    drawn = {name: float(stats[name]) if defined.size else None for name in BOX}
    return {**drawn, "features": values.size, "undefined": values.size - defined.size}


def _features(model, layers):
    """Makes a function of images that returns the outputs of the layers in inference mode."""
    known = _outputs(model, set(layers))
    missing = [name for name in layers if name not in known]
    if missing:
        raise InputError(f"The model {model.name!r} has no layer {missing[0]!r}: give layers that both models have.")
    inner = keras.Model(model.inputs[0], [known[name] for name in layers])
    return lambda x: tf.nest.flatten(inner(x, training=False))  # Keras returns a single output without a list


def _outputs(model, names):
    """Finds the symbolic outputs of the layers of these names in a functional model and the models nested in it, by name."""
    found = {}
    for node in nodes_of(graph_of(model)):
        layer = node.operation
        if layer.name in names:
            found.setdefault(layer.name, node.outputs[0])
        elif graph_of(layer) is not None and (inner := _outputs(layer, names - set(found))):
            part = keras.Model(layer.inputs, list(inner.values()))
            found |= zip(inner, tf.nest.flatten(part(node.input_tensors)), strict=True)
    return found


def _flat(a):
    return tf.cast(tf.reshape(a, [-1, a.shape[-1]]), tf.float64)


def _moments(extract, x):
    """Traces a function of images: for each layer n, sum a, sum b, sum a², sum b² and sum ab, float64 [6, channels]."""
    # subtracts the means of the first batch, so that large means cost no digits
    shifts = [[tf.reduce_mean(_flat(a), 0) for a in features(x)] for features in extract]

    def moments(x):
        sums = []
        for a, b, shift_a, shift_b in zip(extract[0](x), extract[1](x), *shifts, strict=True):
            a, b = _flat(a) - shift_a, _flat(b) - shift_b
            sums.append(tf.stack([tf.reduce_sum(term, 0) for term in (tf.ones_like(a), a, b, a * a, b * b, a * b)]))
        return sums

    return tf.function(moments).get_concrete_function(tf.TensorSpec([None, *x.shape[1:]], tf.float32))


def _r2(sums):
    """Computes R² [channels] from the sums of `_moments`."""
    n, a, b, aa, bb, ab = sums
    variance_a, variance_b = aa - a * a / n, bb - b * b / n
    # rounding leaves a constant a little variance
    varies = (variance_a > 1e-12 * (aa + n * 1e-12)) & (variance_b > 1e-12 * (bb + n * 1e-12))
    covariance = ab - a * b / n
    product = np.where(varies, variance_a * variance_b, np.nan)
    return np.minimum(covariance**2 / product, 1.0)
