"""How much of the pre-trained features survives: R² between activations before and after fine-tuning (Fig. 4)."""

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.errors import InputError
from l2sp_tf.models import units

BOX = ("whislo", "q1", "med", "q3", "whishi")


def activation_r2(finetuned, pretrained, images, *, layers=None):
    """R² of each feature's activations after fine-tuning with respect to those before (Fig. 4).

    R² = cov(a, b)² / (var(a) var(b)), the share of a feature's variance that a linear function of
    its pre-trained self explains; a runs over all images and positions. Sums are streamed in float64, and
    no activation is stored.

    Args:
        finetuned, pretrained: two functional models with layers of the same names and shapes.
        images: an iterable of float32 [b, h, w, c], or of tuples that begin with them, which is
            read once.
        layers: names of the layers to compare; by default the outputs of the units of
            `models.units`: of the first convolution and of each residual block.

    Returns:
        A dict from layer to float64 [channels]; NaN for a feature that is constant in either model.

    Raises:
        InputError: a layer is missing from a model, or there are no images.
    """
    layers = [unit[-1].name for unit in units(pretrained)] if layers is None else list(layers)
    extract = [_features(model, layers) for model in (pretrained, finetuned)]
    sums = None

    @tf.function
    def add(x, sums, shifts):
        return [_moments(a, b, *shift, old) for a, b, shift, old in zip(extract[0](x), extract[1](x), shifts, sums, strict=True)]

    for batch in images:
        x = tf.cast(batch[0] if isinstance(batch, (tuple, list)) else batch, tf.float32)
        if sums is None:  # sums about the first batch's means lose no digits to large means
            shifts = [(_means(a), _means(b)) for a, b in zip(extract[0](x), extract[1](x), strict=True)]
            sums = [tf.zeros([6, len(shift[0])], tf.float64) for shift in shifts]
        sums = add(x, sums, shifts)
    if sums is None:
        raise InputError("There are no images to compare activations on.")
    return {name: _r2(total.numpy()) for name, total in zip(layers, sums, strict=True)}


def box(values):
    """What a box plot shows of R² values: quartiles, and whiskers that end at the outermost values within 1.5 boxes.

    Args:
        values: [n], NaN for undefined ones.

    Returns:
        {"whislo", "q1", "med", "q3", "whishi": float, or None if no value is defined; "features": n,
        "undefined": the number of NaN}.
    """
    values = np.asarray(values, np.float64)
    defined = values[~np.isnan(values)]
    counts = {"features": len(values), "undefined": len(values) - len(defined)}
    if not len(defined):
        return {**dict.fromkeys(BOX), **counts}
    q1, med, q3 = np.percentile(defined, [25, 50, 75])
    inside = defined[(defined >= q1 - 1.5 * (q3 - q1)) & (defined <= q3 + 1.5 * (q3 - q1))]
    return {**{name: float(v) for name, v in zip(BOX, (inside.min(), q1, med, q3, inside.max()), strict=True)}, **counts}


def _features(model, layers):
    """The model as a function of images that returns the outputs of the layers, in inference mode."""
    known = {layer.name: layer for layer in model.layers}
    missing = [name for name in layers if name not in known]
    if missing:
        raise InputError(f"The model {model.name!r} has no layer {missing[0]!r}: give layers that both models have.")
    inner = keras.Model(model.inputs[0], [known[name].output for name in layers])
    return lambda x: tf.nest.flatten(inner(x, training=False))  # Keras gives a single output bare


def _flat(a):
    return tf.cast(tf.reshape(a, [-1, a.shape[-1]]), tf.float64)


def _means(a):
    return tf.reduce_mean(_flat(a), 0)


def _moments(a, b, shift_a, shift_b, old):
    """Adds n, sum a, sum b, sum a², sum b² and sum ab of a batch: float64 [6, channels]."""
    a, b = _flat(a) - shift_a, _flat(b) - shift_b
    return old + tf.stack([tf.reduce_sum(term, 0) for term in (tf.ones_like(a), a, b, a * a, b * b, a * b)])


def _r2(sums):
    n, a, b, aa, bb, ab = sums
    variance_a, variance_b = aa - a * a / n, bb - b * b / n
    # what is left of a constant's variance by rounding is no variance
    varies = (variance_a > 1e-12 * (aa + n * 1e-12)) & (variance_b > 1e-12 * (bb + n * 1e-12))
    covariance = ab - a * b / n
    product = np.where(varies, variance_a * variance_b, np.nan)
    return np.minimum(covariance**2 / product, 1.0)
