"""The diagonal of the Fisher information on source images: the unnumbered estimate of section 3.

Symbols: `p` = f(x) the probabilities of one image, `z` its logits, `u` a cotangent of the logits,
H the Fisher information of z: diag(p) - p pᵀ for one of K classes, diag(p (1 - p)) for K Bernoulli
outputs. With J the Jacobian of z with respect to the weights, F_jj = mean over images of
(Jᵀ H J)_jj, so any u with E[u uᵀ] = H gives an unbiased estimate (Jᵀ u)_j² from one backward pass.
"""

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.files.arrays import digest_of, manifest_of
from l2sp_tf.files.errors import InputError
from l2sp_tf.fisher.diagonal import MODES, Fisher, check_positive, relative_error
from l2sp_tf.fisher.layer_rules import check_layers
from l2sp_tf.fisher.likelihoods import FAMILIES, NOISE, likelihood_of
from l2sp_tf.fisher.tracing import traced
from l2sp_tf.penalties.weights import keyed_weights, values_of

# Cotangents that go through the backward pass side by side, and share what depends on the input alone: 3, or up to 9
# as long as their gradients take at most so many bytes.
COLUMNS, MOST_COLUMNS, GRADIENT_BYTES = 3, 9, 2**30
MIN_BATCHES = 8  # before `tolerance` may stop a pass: the spread of fewer batches is itself too uncertain


def fisher_diagonal(
    model: keras.Model,
    images: Any,
    mode: str = "rademacher",
    samples: int = 1,
    seed: int = 0,
    *,
    from_logits: bool | None = None,
    batch_size: int | None = None,
    first: int = 0,
    source: str = "",
    tolerance: float | None = None,
    progress: bool = False,
    slow_fallback: bool = False,
) -> Fisher:
    """Estimates the Fisher diagonal of section 3 on source images.

    F_jj = 1/m sum_i sum_k f_k(x_i) (d log f_k(x_i) / dw_j)², the unnumbered equation of section
    3, for each trainable weight w_j: squared for each image and class, then averaged. It uses no
    labels, runs the model in inference mode, and leaves it bit-identical.

    H = diag(p) - p pᵀ is the Fisher information of the logits, and u a cotangent of them. The mode is
    - "exact": sums over the K - 1 columns u of a factor of H, with a backward pass for each;
    - "mc": u = onehot(k) - p, with the label k drawn from the model's own prediction p;
    - "rademacher": u = S ε, S = diag(√p) - p √pᵀ, with random signs ε. It is unbiased like "mc". Its
      variance is at most 2 F² an image; that of "mc" has no bound. With two classes it is exact,
      because H has rank 1.

    K sigmoids are K independent Bernoulli outputs, whose log-likelihoods add: H = diag(p (1 - p)).
    Then "exact" takes the K columns √(p_k (1 - p_k)) e_k, "mc" u = y - p with each y_k drawn from
    p_k, and "rademacher" u_k = ε_k √(p_k (1 - p_k)), which is exact for one output.

    A softmax or sigmoid operation decides what the output means. Otherwise `from_logits` decides,
    or else the loss that the model was compiled with. Without either, two or more outputs of a
    linear operation are logits of classes.

    All modes compute a last Dense layer in closed form, F_W[c, k] = mean h_c² p_k (1 - p_k), except
    with `slow_fallback`. Random numbers are a function of (seed, index of the image, draw) alone: no
    batch size and no split changes them.

    Layers compute in float32, or in float64 if their policy says so. In half precision the squares
    would underflow, so the pass replaces such policies while it traces the model, and casts the
    weights. Probabilities and cotangents are float64, and so are the sums over batches; a float32
    square below 1e-38 is 0.

    Beside the model, peak memory is at most about 4 (B (A + c S + max_l(P C + c (2 P K + 2 C K))) + 4 N)
    bytes: B images a batch; A floats of layer outputs for each image, S of them from layers with weights;
    N weights; c backward passes side by side (1 for a draw; in exact mode 3, or up to 9 where their
    gradients fit into 1 GiB); P output positions, C input and K output channels of the layer for which
    this is largest. A batch that does not fit is split, with the same result.

    Args:
        model: a built Keras classifier, with logits, a softmax or sigmoids [B, K] as its only output. The
            pass undoes a softmax or sigmoid by its argument, never by a logarithm.
        images: a `tf.data.Dataset` of batches x or (x, y), of which it ignores y; or an array.
        mode: "rademacher", "mc" or "exact".
        samples: draws for each image, averaged.
        seed: of the draws, at least 0.
        from_logits: whether the model's output is logits, where no softmax or sigmoid operation made
            it; None finds out. One output is a Bernoulli one, more are classes unless the compiled
            loss is binary. Probabilities that no operation made are undone by the logarithm.
        batch_size: 32 for an array; None leaves the batches of a dataset as they are.
        first: the index of the first image, for one part of a longer pass; `+` joins the parts.
        source: any words or JSON that describe the images, kept in the provenance.
        tolerance: stops as soon as the largest of `Fisher.standard_error` is at most this, but
            not before 8 batches.
        progress: shows a progress bar.
        slow_fallback: differentiates the whole model for one image after the other. This is exact too,
            and serves shared layers and layers called in a loop, such as recurrent ones.

    Returns:
        A `Fisher` with one float32 array for each trainable weight.

    Raises:
        InputError: a bad argument; no images; a trainable weight of a layer that is shared, called in
            a loop, or quantized; an output of another shape or of unknown meaning; outputs that are
            not finite.
    """
    _check_arguments(mode, samples, seed, first, tolerance)
    estimator = _Estimator(model, mode, samples, seed, from_logits, slow_fallback)
    sums = _Sums(estimator.weights)
    batches, total = _batches(images, batch_size)
    bar = keras.utils.Progbar(total, stateful_metrics=["relative error"], unit_name="batch") if progress else None
    for x in batches:
        sums.add(_length(x), estimator(x, first + sums.images))
        worst = max(sums.standard_error().values()) if bar or tolerance is not None else math.inf
        if bar:
            bar.update(sums.batches, [("relative error", worst)] if math.isfinite(worst) else None)
        if tolerance is not None and sums.batches >= MIN_BATCHES and worst <= tolerance:
            break
    if not sums.images:
        raise InputError("There are no images to compute the Fisher diagonal on: give at least one.")
    options = {"mode": mode, "samples": samples, "seed": seed, "first": first}
    provenance = {"source": source, "images": sums.images, **options, **_identity(model), "transforms": []}
    return Fisher(sums.means(), provenance, sums.statistics())


class _Sums:
    """Sums over batches in float64, and the statistics of `Fisher.standard_error`."""

    def __init__(self, weights):
        self._totals = {key: tf.Variable(tf.zeros(weight.variable.shape, tf.float64)) for key, weight in weights.items()}
        self._layers = {}
        for key in weights:
            self._layers.setdefault(key.rpartition("/")[0], []).append(key)
        self._statistics = np.zeros((len(self._layers), 4))
        self._pending = []  # the means of each layer, still on the device
        self._accumulate = tf.function(self._accumulate_eagerly, autograph=False)
        self.batches = self.images = 0

    def add(self, n, sums):
        """Adds the sums over one batch of n images."""
        self.batches, self.images = self.batches + 1, self.images + n
        self._pending.append((n, self._accumulate(sums)))

    def _accumulate_eagerly(self, sums):
        entries = {}
        for key, value in sums.items():
            value = tf.cast(value, tf.float64)
            self._totals[key].assign_add(value)
            entries[key] = tf.reduce_sum(value)
        sizes = {key: total.shape.num_elements() for key, total in self._totals.items()}
        return tf.stack([sum(entries[key] for key in keys) / sum(sizes[key] for key in keys) for keys in self._layers.values()])

    def statistics(self):
        """For each layer: batches M, images N, sum_b n_b t_b and sum_b n_b t_b²."""
        for n, total in self._pending:
            t = total.numpy() / n
            self._statistics += np.stack([np.ones_like(t), np.full_like(t, n), n * t, n * t**2], axis=1)
        self._pending.clear()
        return dict(zip(self._layers, self._statistics.tolist(), strict=True))

    def standard_error(self):
        return {layer: relative_error(*sums) for layer, sums in self.statistics().items()}

    def means(self):
        """The mean over the images, in float64.

        Raises:
            InputError: it is not finite.
        """
        means = {key: total.numpy() / self.images for key, total in self._totals.items()}
        bad = [key for key, mean in means.items() if not np.all(np.isfinite(mean))]
        if bad:
            raise InputError(
                f"The Fisher diagonal of {', '.join(bad[:5])} is not finite: check that the model's outputs on these images are."
            )
        return means


class _Estimator:
    """Sums the squares of each weight over the images of a batch; its arguments are those of `fisher_diagonal`."""

    def __init__(self, model, mode, samples, seed, from_logits, slow):
        self.model, self.mode, self.samples, self.seed = model, mode, samples, seed
        self.from_logits, self.slow = from_logits, slow
        self.weights = {key: w for key, w in keyed_weights(model).items() if w.variable.trainable}
        if not self.weights:
            raise InputError(f"The model {model.name!r} has no trainable weight: set trainable=True on those that need one.")
        if not slow:
            check_layers(self.weights)
        self.likelihood = None  # tracing the model finds it
        self._functions = {}
        self._largest = math.inf

    def __call__(self, x, first):
        """The sums over the batch x, whose first image has the index `first`; a dict from key to tensor."""
        n = _length(x)
        if n <= self._largest:
            try:
                return self._run(x, first)
            except tf.errors.ResourceExhaustedError:
                if n == 1:
                    raise
                self._largest = n // 2
        half = n // 2
        left = self(tf.nest.map_structure(lambda t: t[:half], x), first)
        right = self(tf.nest.map_structure(lambda t: t[half:], x), first + half)
        return {key: left[key] + right[key] for key in left}

    def _run(self, x, first):
        x, n = tf.nest.map_structure(tf.convert_to_tensor, x), _length(x)
        spec = tf.nest.map_structure(lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), x)
        if str(spec) not in self._functions:
            sums = self._sums_one_by_one if self.slow else lambda x, noise: self._sums(x, noise, batch=n)
            noise = tf.TensorSpec([self.samples, None, None], NOISE[self.mode])
            self._functions[str(spec)] = tf.function(sums, autograph=False).get_concrete_function(spec, noise)
        noise = self.likelihood.noise(self.mode, self.samples, self.seed, range(first, first + n))
        sums, doubtful = self._functions[str(spec)](*tf.nest.flatten(x), tf.constant(noise))
        self.likelihood.check(int(doubtful), n, self.model)
        return sums

    def _sums(self, x, noise, batch=None):
        """Takes one forward pass, and one backward pass of all images together for each cotangent.

        Args:
            batch: the number of images, to bound the memory of the gradients. None means one image, and
                differentiates by the weights themselves instead of layer by layer.

        Returns:
            (a dict from key to the sum of squares, the number of doubtful outputs)
        """
        with traced(self.model, self.weights, by_layer=batch is not None) as trace:
            output = self.model(x, training=False)
            output = tf.nest.flatten(output)[0] if len(tf.nest.flatten(output)) == 1 else output
            self.likelihood = likelihood_of(output, self.model, self.from_logits)
            logits = self.likelihood.logits()
        trace.check()
        p = FAMILIES[self.likelihood.family](logits)
        closed = trace.closed_form(logits, p.variances)
        columns = COLUMNS if batch is None else _columns(trace.sites, batch)
        zeros = self._zeros(key for key in self.weights if key not in closed)
        sums = _sum_over(*p.cotangents(self.mode, noise), columns, lambda us: trace.squares(logits, us), zeros)
        return {key: (closed | sums)[key] for key in self.weights}, self.likelihood.doubtful(output)

    def _sums_one_by_one(self, x, noise):
        """Adds the `_sums` of one image after the other."""

        def one(i, sums, doubtful):
            image = tf.nest.map_structure(lambda t: t[i : i + 1], x)
            found, more = self._sums(image, noise[:, i : i + 1])
            return i + 1, {key: sums[key] + found[key] for key in sums}, doubtful + more

        n = tf.shape(tf.nest.flatten(x)[0])[0]
        start = (tf.constant(0), self._zeros(self.weights), tf.constant(0))
        return tf.while_loop(lambda i, *_: i < n, one, start, parallel_iterations=1)[1:]

    def _zeros(self, keys):
        variables = {key: self.weights[key].variable for key in keys}
        return {key: tf.zeros(v.shape, tf.float64 if v.dtype == "float64" else tf.float32) for key, v in variables.items()}


def _sum_over(count, cotangent, columns, squares, zeros):
    """Sums squares(list of cotangents), dicts like `zeros`, over cotangent(0) ... cotangent(count - 1), `columns` at a time."""
    columns = min(columns, count)

    def step(i, sums):
        # the last group is filled up with zeros
        group = [cotangent(tf.minimum(j, count - 1)) * tf.cast(j < count, tf.float64) for j in (i + k for k in range(columns))]
        found = squares(group)
        return i + columns, {key: total + tf.cast(found.get(key, 0), total.dtype) for key, total in sums.items()}

    if count == columns:
        return step(0, zeros)[1]
    return tf.while_loop(lambda i, _: i < count, step, (tf.constant(0), zeros), parallel_iterations=1)[1]


def _columns(sites, batch):
    """How many cotangents go side by side, by the bytes of the gradients of one."""
    shapes = [site.z.shape[1:] for site in sites]
    if any(None in shape for shape in shapes):
        return COLUMNS
    size = 4 * batch * sum(shape.num_elements() for shape in shapes)
    return min(MOST_COLUMNS, max(COLUMNS, GRADIENT_BYTES // max(size, 1)))


def _batches(images, batch_size):
    """(the batches x that are not empty, their number or None)."""
    if isinstance(images, tf.data.Dataset):
        batches = images if batch_size is None else images.unbatch().batch(batch_size)
        total = int(batches.cardinality())
        inputs = (batch[0] if isinstance(batch, tuple) else batch for batch in batches)
        return (x for x in inputs if _length(x)), total if total >= 0 else None
    if not getattr(images, "shape", ()):
        raise InputError(f"The images are a {type(images).__name__}: give a tf.data.Dataset of batches or an array of images.")
    size, n = batch_size or 32, images.shape[0]
    return (images[i : i + size] for i in range(0, n, size)), -(-n // size)


def _identity(model):
    """The part of the provenance that identifies the weights: their digest, as in `Anchors`, and the sha256 of each."""
    manifest = manifest_of(values_of(model))
    return {"model": digest_of(manifest), "weights": {entry["name"]: entry["sha256"] for entry in manifest}}


def _length(x):
    return int(tf.nest.flatten(x)[0].shape[0])


def _check_arguments(mode, samples, seed, first, tolerance):
    if mode not in MODES:
        raise InputError(f"The mode is {mode!r}: choose one of {', '.join(MODES)}.")
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0), ("first", first, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
            raise InputError(f"{name} is {value!r}: give an integer that is at least {least}.")
    if mode == "exact" and samples != 1:
        raise InputError(f"samples is {samples}, but the mode 'exact' draws nothing: leave it at 1.")
    if tolerance is not None:
        check_positive(tolerance, "tolerance")
