"""The diagonal of the Fisher information on source images: the unnumbered estimate of section 3.

Symbols: `p` = f(x) the probabilities of one image, `z` its logits, `u` a cotangent of the logits,
H the Fisher information of z: diag(p) - p pᵀ for one of K classes, diag(p (1 - p)) for K Bernoulli
outputs. With J the Jacobian of z with respect to the weights, F_jj = mean over images of
(Jᵀ H J)_jj, so any u with E[u uᵀ] = H gives an unbiased estimate (Jᵀ u)_j² from one backward pass.
"""

import math

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.files.arrays import digest_of, manifest_of
from l2sp_tf.files.errors import InputError
from l2sp_tf.fisher.diagonal import MODES, Fisher, check_positive, relative_error
from l2sp_tf.fisher.layer_rules import check_layers, instrumented
from l2sp_tf.fisher.likelihoods import CATEGORICAL, FAMILIES, likelihood_of, random_signs, random_uniforms
from l2sp_tf.penalties.weights import keyed_weights

# Cotangents go through the backward pass side by side, sharing what depends on the input alone: 3 of them, or up to 9 as
# long as their gradients take no more than so many bytes.
COLUMNS, MOST_COLUMNS, GRADIENT_BYTES = 3, 9, 2**30
MIN_BATCHES = 8  # before `tolerance` may stop a pass: the spread of fewer batches is itself too uncertain


def fisher_diagonal(
    model,
    images,
    mode="rademacher",
    samples=1,
    seed=0,
    *,
    from_logits=None,
    batch_size=None,
    first=0,
    source="",
    tolerance=None,
    progress=False,
    slow_fallback=False,
):
    """Estimates the Fisher diagonal of section 3 on source images.

    F_jj = 1/m sum_i sum_k f_k(x_i) (d log f_k(x_i) / dw_j)², the unnumbered equation of section
    3, for each trainable weight w_j: squared for each image and class, then averaged. The labels
    are not used, and the model, run in inference mode, is left bit-identical.

    With H = diag(p) - p pᵀ and u a cotangent of the logits, the modes are
    - "exact": the sum over the K - 1 columns u of a factor of H, a backward pass each;
    - "mc": u = onehot(k) - p, the label k drawn from the model's own prediction p;
    - "rademacher": u = S ε, S = diag(√p) - p √pᵀ, ε random signs. Unbiased like "mc", and with a
      variance that is at most 2 F² an image where that of "mc" is not bounded. With two classes
      it is exact, because H has rank 1.

    K sigmoids are K independent Bernoulli outputs, whose log-likelihoods add: H = diag(p (1 - p)).
    Then "exact" takes the K columns √(p_k (1 - p_k)) e_k, "mc" u = y - p with each y_k drawn from
    p_k, and "rademacher" u_k = ε_k √(p_k (1 - p_k)), which is exact for one output.

    What the output means is decided by its operation, a softmax or sigmoid. Otherwise `from_logits`
    decides, or else the loss that the model was compiled with. If there is neither, two or more
    outputs of a linear operation are taken for logits of classes.

    In all modes a last Dense layer is computed in closed form, F_W[c, k] = mean h_c² p_k (1 - p_k),
    but not with `slow_fallback`. Random numbers are a function of (seed, index of the image, draw)
    alone: no batch size and no split changes them.

    Layers compute in float32 (in float64 if their policy says so; never in half precision, which
    the squares would underflow: the half-precision policy of a layer is replaced while the pass is
    traced, and its weights are cast). Probabilities and cotangents are computed, and batches summed,
    in float64; a float32 square below 1e-38 is 0.

    Peak memory beside the model is at most about 4 (B (A + c S + max_l(P C + c (2 P K + 2 C K))) + 4 N)
    bytes: B images a batch, A floats of layer outputs for each image, S of them from layers with weights, N
    weights, c backward passes side by side (1 for a draw; in exact mode 3, or up to 9 where their gradients
    fit into 1 GiB); P output positions, C input and K output channels of the layer for which this is
    largest. A batch that does not fit is split, with the same result.

    Args:
        model: a built Keras classifier, with logits, a softmax or sigmoids [B, K] as its only output. A
            softmax or sigmoid is undone by taking its argument, never by a logarithm.
        images: a `tf.data.Dataset` of batches x or (x, y), of which y is ignored; or an array.
        mode: "rademacher", "mc" or "exact".
        samples: draws for each image, averaged.
        seed: of the draws, at least 0.
        from_logits: whether the model's output is logits, where no softmax or sigmoid operation made
            it; None finds out. One output is a Bernoulli one, more are classes unless the compiled
            loss is binary. Of probabilities that no operation made the logarithm is taken.
        batch_size: 32 for an array; None leaves the batches of a dataset as they are.
        first: the index of the first image, for one part of a longer pass; `+` joins the parts.
        source: any words or JSON that describe the images, kept in the provenance.
        tolerance: stops as soon as the largest of `Fisher.standard_error` is at most this, but
            not before 8 batches.
        progress: shows a progress bar.
        slow_fallback: takes an exact path that differentiates the whole model for one image after the
            other, and so serves shared layers and those called in a loop, such as recurrent ones.

    Returns:
        A `Fisher` with one float32 array for each trainable weight.

    Raises:
        InputError: a bad argument; no images; a trainable weight of a layer that is shared, called in
            a loop, or quantized; an output of another shape, or of which it cannot be told what it means;
            outputs that are not finite.
    """
    _check_arguments(mode, samples, seed, first, tolerance)
    estimator = _Estimator(model, mode, samples, seed, from_logits, slow_fallback)
    sums = _Sums(estimator.weights)
    batches, total = _batches(images, batch_size)
    bar = keras.utils.Progbar(total, stateful_metrics=["relative error"], unit_name="batch") if progress else None
    count = first
    for x in batches:
        n = _length(x)
        if not n:
            continue
        sums.add(n, estimator(x, count))
        count += n
        if bar or tolerance is not None:
            worst = max(sums.standard_error().values())
            if bar:
                bar.update(sums.batches, [("relative error", worst)] if math.isfinite(worst) else None)
            if tolerance is not None and sums.batches >= MIN_BATCHES and worst <= tolerance:
                break
    if count == first:
        raise InputError("There are no images to compute the Fisher diagonal on: give at least one.")
    provenance = {
        "source": source,
        "images": count - first,
        "mode": mode,
        "samples": samples,
        "seed": seed,
        "first": first,
        **_identity(model),
        "transforms": [],
    }
    return Fisher(sums.means(), provenance, sums.statistics())


class _Sums:
    """Sums over batches in float64, and what `Fisher.standard_error` needs of them."""

    def __init__(self, weights):
        self._totals = {key: tf.Variable(tf.zeros(weight.variable.shape, tf.float64)) for key, weight in weights.items()}
        self._layers = {}
        for key in weights:
            self._layers.setdefault(key.rpartition("/")[0], []).append(key)
        self._statistics = np.zeros((len(self._layers), 4))
        self._pending = []  # the means of each layer, not yet fetched from the device
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
    """Computes, for a batch, the sum over its images of the squares of each weight.

    Args:
        model, mode, samples, seed, from_logits, slow: as in `fisher_diagonal`.
    """

    def __init__(self, model, mode, samples, seed, from_logits, slow):
        self.model, self.mode, self.samples, self.seed = model, mode, samples, seed
        self.from_logits, self.slow = from_logits, slow
        self.weights = {key: w for key, w in keyed_weights(model).items() if w.variable.trainable}
        if not self.weights:
            raise InputError(f"The model {model.name!r} has no trainable weight: set trainable=True on what shall have a Fisher.")
        if not slow:
            check_layers(self.weights)
        self.likelihood = None  # known as soon as the model is traced
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
        x = tf.nest.map_structure(tf.convert_to_tensor, x)
        self._batch = _length(x)
        spec = tf.nest.map_structure(lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), x)
        if str(spec) not in self._functions:
            noise = {"rademacher": [tf.TensorSpec([None] * 3, tf.int8)], "mc": [tf.TensorSpec([None] * 3, tf.float64)]}
            function = tf.function(self._slow_sums if self.slow else self._fast_sums, autograph=False)
            self._functions[str(spec)] = function.get_concrete_function(spec, *noise.get(self.mode, []))
        sums, doubtful = self._functions[str(spec)](*tf.nest.flatten(x), *self._noise(first, _length(x)))
        self.likelihood.check(int(doubtful), _length(x), self.model)
        return sums

    def _noise(self, first, n):
        """The random numbers of the images first..first+n-1: signs [samples, n, K], uniforms [samples, n, 1 or K] or nothing."""
        if self.mode == "exact":
            return []
        function = random_uniforms if self.mode == "mc" else random_signs
        one = self.mode == "mc" and self.likelihood.family == CATEGORICAL  # label an image, whose draws a count would not change
        count = 1 if one else self.likelihood.classes
        draws = [function(self.seed, draw, first, first + n, count) for draw in range(self.samples)]
        return [tf.constant(np.stack(draws))]

    def _traced(self, x):
        """The model's output and the logits [B, K] that it means.

        Raises:
            InputError: the model has several outputs, or it cannot be told what its output means.
        """
        outputs = self.model(x, training=False)
        if len(tf.nest.flatten(outputs)) == 1:
            outputs = tf.nest.flatten(outputs)[0]
        self.likelihood = likelihood_of(outputs, self.model, self.from_logits)
        return outputs, self.likelihood.logits()

    def _count_doubtful(self, output):
        return tf.reduce_sum(tf.cast(self.likelihood.doubtful(output), tf.int32))

    def _fast_sums(self, x, noise=None):
        """One forward pass, and one backward pass for all images together for each cotangent."""
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            with instrumented(self.model, self.weights, tape) as trace:
                output, logits = self._traced(x)
        trace.check()
        p = FAMILIES[self.likelihood.family](logits)
        head = next((site for site in trace.sites if site.is_dense and site.output.name == logits.name), None)
        sites = [site for site in trace.sites if site is not head]
        names = {id(weight.variable): key for key, weight in self.weights.items()}

        def squares(cotangents):
            outputs = [site.output for site in sites]
            gradients = [tape.gradient(logits, outputs, output_gradients=tf.cast(u, logits.dtype)) for u in cotangents]
            found = {}
            for site, *gs in zip(sites, *gradients, strict=True):
                found.update({} if gs[0] is None else site.squares(gs))
            return {names[name]: square for name, square in found.items() if name in names}

        closed = {} if head is None else {names[name]: s for name, s in _head_squares(head, p.variances).items() if name in names}
        open_keys = [key for key in self.weights if key not in closed]
        sums = self._sum_over_cotangents(p, noise, squares, open_keys, self._columns(sites))
        return {key: (closed | sums)[key] for key in self.weights}, self._count_doubtful(output)

    def _slow_sums(self, x, noise=None):
        """One image after the other, each differentiated with respect to the weights themselves."""
        n = tf.shape(tf.nest.flatten(x)[0])[0]

        def one(i, sums, doubtful):
            image = tf.nest.map_structure(lambda t: t[i : i + 1], x)
            with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
                with instrumented(self.model, self.weights, tape, rules=False) as trace:
                    output, logits = self._traced(image)

            def squares(cotangents):
                gradients = [tape.gradient(logits, trace.values, output_gradients=tf.cast(u, logits.dtype)) for u in cotangents]
                reached = [key for key, g in gradients[0].items() if g is not None]
                return {key: sum(tf.square(tf.convert_to_tensor(g[key])) for g in gradients) for key in reached}

            own = None if noise is None else noise[:, i : i + 1]
            found = self._sum_over_cotangents(FAMILIES[self.likelihood.family](logits), own, squares, self.weights)
            return i + 1, {key: sums[key] + found[key] for key in sums}, doubtful + self._count_doubtful(output)

        start = (tf.constant(0), self._zeros(self.weights), tf.constant(0))
        return tf.while_loop(lambda i, *_: i < n, one, start, parallel_iterations=1)[1:]

    def _sum_over_cotangents(self, p, noise, squares, keys, columns=COLUMNS):
        """sum over the cotangents u, one column of a factor of H or one draw each, of squares(u)."""
        if self.mode == "exact" or (self.mode == "rademacher" and p.rank == 1):  # a sign changes no square
            count, scale, cotangent = p.rank, 1, p.column
        else:
            draw = {"rademacher": p.by_signs, "mc": p.by_labels}[self.mode]
            count, scale, cotangent = self.samples, self.samples, lambda i: draw(noise[i])

        def step(i, sums):
            group = [i + j for j in range(min(columns, count))]
            found = squares([cotangent(tf.minimum(j, count - 1)) * tf.cast(j < count, tf.float64) for j in group])
            return i + columns, {key: total + tf.cast(found.get(key, 0), total.dtype) for key, total in sums.items()}

        if count <= columns:
            sums = step(0, self._zeros(keys))[1]
        else:
            start = (tf.constant(0), self._zeros(keys))
            sums = tf.while_loop(lambda i, _: i < count, step, start, parallel_iterations=1)[1]
        return sums if scale == 1 else {key: total / scale for key, total in sums.items()}

    def _columns(self, sites):
        """How many cotangents go side by side, by the bytes of the gradients of one."""
        shapes = [site.output.shape[1:] for site in sites]
        if any(None in shape for shape in shapes):
            return COLUMNS
        size = 4 * self._batch * sum(shape.num_elements() for shape in shapes)
        return min(MOST_COLUMNS, max(COLUMNS, GRADIENT_BYTES // max(size, 1)))

    def _zeros(self, keys):
        return {key: tf.zeros(self.weights[key].variable.shape, _full(self.weights[key].variable.dtype)) for key in keys}


def _head_squares(head, variances):
    """The last Dense layer in closed form: sum_b h_bc² p_bk (1 - p_bk), and sum_b p_bk (1 - p_bk) for the bias."""
    layer, h = head.layer, tf.cast(head.x, tf.float64)
    squares = {id(layer.kernel): tf.matmul(tf.square(h), variances, transpose_a=True)}
    if layer.bias is not None:
        squares[id(layer.bias)] = tf.reduce_sum(variances, 0)
    return squares


def _batches(images, batch_size):
    """(an iterable of batches x, their number or None)."""
    if isinstance(images, tf.data.Dataset):
        if batch_size is not None:
            images = images.unbatch().batch(batch_size)
        total = int(images.cardinality())
        return (batch[0] if isinstance(batch, tuple) else batch for batch in images), total if total >= 0 else None
    if not getattr(images, "shape", ()):
        raise InputError(f"The images are a {type(images).__name__}: give a tf.data.Dataset of batches or an array of images.")
    size, n = batch_size or 32, images.shape[0]
    return (images[i : i + size] for i in range(0, n, size)), -(-n // size)


def _identity(model):
    """The part of the provenance that tells the weights: their digest, as `Anchors` have it, and the sha256 of each."""
    manifest = manifest_of({key: weight.variable.numpy() for key, weight in keyed_weights(model).items()})
    return {"model": digest_of(manifest), "weights": {entry["name"]: entry["sha256"] for entry in manifest}}


def _length(x):
    return int(tf.nest.flatten(x)[0].shape[0])


def _full(dtype):
    """float64 for float64, float32 for every other dtype."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"


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
