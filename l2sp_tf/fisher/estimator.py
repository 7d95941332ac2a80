"""The diagonal of the Fisher information on source images: the unnumbered estimate of section 3.

Symbols: `p` = f(x) the probabilities of one image, `z` its logits, `u` a cotangent of the logits,
H the Fisher information of z: diag(p) - p pᵀ for one of K classes, diag(p (1 - p)) for K Bernoulli
outputs. With J the Jacobian of z with respect to the weights, F_jj = mean over images of
(Jᵀ H J)_jj, so any u with E[u uᵀ] = H gives an unbiased estimate (Jᵀ u)_j² from one backward pass.
"""

import hashlib
import json
import math
import re

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.files.arrays import Arrays, digest_of, load_arrays, manifest_of, save_arrays
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import parse_json, refusing
from l2sp_tf.fisher.layer_rules import check_layers, instrumented
from l2sp_tf.fisher.likelihoods import CATEGORICAL, FAMILIES, likelihood_of, random_signs, random_uniforms
from l2sp_tf.penalties.weights import keyed_weights

FORMAT = "l2sp_tf.fisher.v1"
MODES = ("rademacher", "mc", "exact")
PROVENANCE = {"source", "images", "mode", "samples", "seed", "first", "model", "transforms"}
# Cotangents go through the backward pass side by side, sharing what depends on the input alone: 3 of them, or up to 9 as
# long as their gradients take no more than so many bytes.
COLUMNS, MOST_COLUMNS, GRADIENT_BYTES = 3, 9, 2**30
MIN_BATCHES = 8  # before `tolerance` may stop a pass: the spread of fewer batches is itself too uncertain


class Fisher(Arrays):
    """The Fisher diagonal, a read-only mapping from key to float32 array of the weight's shape.

    Keys are those of `l2sp_tf.penalties.weights.keyed_weights`. Made by `fisher_diagonal` or `load`.

    Attributes:
        provenance: a dict of where the numbers come from: `source` (the caller's words),
            `images` (how many), `mode`, `samples`, `seed`, `first`, `model` (the digest of the
            model's weights), `weights` (the sha256 of each weight of the model, by key; files
            written before lack it) and `transforms`.
    """

    def __init__(self, arrays, provenance, statistics):
        super().__init__(arrays, "float32")
        self.provenance = json.loads(json.dumps(provenance))
        self._statistics = {layer: [float(n) for n in sums] for layer, sums in statistics.items()}

    def __repr__(self):
        size = sum(array.size for array in self.values())
        return f"Fisher({len(self)} arrays, {size:,} numbers, {self.provenance['images']} images, digest {self.digest[:12]})"

    @property
    def digest(self):
        """The sha256 of the arrays, provenance and statistics, in hexadecimal."""
        parts = [digest_of(self.manifest), self.provenance, self._statistics]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, path):
        """Writes the arrays, the provenance and the statistics to a safetensors file, atomically.

        Raises:
            OSError: the file cannot be written.
        """
        header = {"provenance": json.dumps(self.provenance), "statistics": json.dumps(self._statistics)}
        save_arrays(path, self._arrays, FORMAT, {"digest": self.digest, **header})

    @classmethod
    def load(cls, path):
        """Reads what `save` wrote, and verifies it against its manifest and digest.

        Raises:
            InputError: the file is missing, is no such file, or is damaged.
        """
        arrays, metadata = load_arrays(path, FORMAT, "no Fisher diagonal", "Fisher.save")
        fisher = cls(arrays, *_header(metadata, path))
        if fisher.digest != metadata.get("digest"):
            raise InputError(f"The Fisher diagonal in {path} is damaged: its digest is not that of its header; use another copy.")
        return fisher

    def __add__(self, other):
        """The Fisher diagonal over the images of two partial passes, weighted by their numbers of images.

        Fields of the provenance that differ (source, seed, first) become lists.

        Raises:
            InputError: the two are of different models, values of the weights, modes or samples, or one is
                transformed.
        """
        if not isinstance(other, Fisher):
            return NotImplemented
        self._check_addable(other)
        m, n = self.provenance["images"], other.provenance["images"]
        arrays = {key: (m * self[key].astype("float64") + n * other[key]) / (m + n) for key in self}
        statistics = {layer: np.add(sums, other._statistics[layer]) for layer, sums in self._statistics.items()}
        merged = {key: _merge(self.provenance[key], other.provenance[key]) for key in ("source", "seed", "first")}
        return Fisher(arrays, {**other.provenance, **self.provenance, **merged, "images": m + n}, statistics)

    def _check_addable(self, other):
        wrong = [
            f"their {name} differ ({self.provenance[name]} and {other.provenance[name]})"
            for name in ("model", "mode", "samples")
            if self.provenance[name] != other.provenance[name]
        ]
        hashes, others = self.provenance.get("weights"), other.provenance.get("weights")
        if hashes and others and hashes != others:  # a file that lacks them has the digest over them
            key = next(key for key in {**hashes, **others} if hashes.get(key) != others.get(key))
            wrong.append(f"they were estimated at other weights (of {key}, say)")
        if {key: array.shape for key, array in self.items()} != {key: array.shape for key, array in other.items()}:
            wrong.append("their weights differ")
        if self.provenance["transforms"] or other.provenance["transforms"]:
            wrong.append("one is transformed already")
        if wrong:
            raise InputError(
                f"These Fisher diagonals cannot be added, because {' and '.join(wrong)}: "
                "add untransformed passes of one model and mode, and transform the sum."
            )

    def standard_error(self):
        """Estimates for each layer the relative standard error of the mean of its entries.

        With t_b the mean over all entries of the layer's weights of the Fisher diagonal of batch
        b alone, n_b the number of its images and N = sum_b n_b over M batches, the mean is
        t = sum_b n_b t_b / N, the variance of one image s² = sum_b n_b (t_b - t)² / (M - 1), and
        the relative standard error sqrt(s² / N) / t. It covers the choice of images and, in the
        sampled modes, the draws. Transforms leave it as it was.

        Returns:
            A dict from the layer's key to a float: infinite after fewer than two batches, 0 for
            a layer whose entries are all 0.
        """
        return {layer: _relative_error(*sums) for layer, sums in self._statistics.items()}

    def clip(self, maximum):
        """Replaces entries above `maximum` by it.

        Raises:
            InputError: `maximum` is not a positive number.
        """
        return self._transformed("clip", _check_number(maximum, "maximum"), lambda f: np.minimum(f, np.float32(maximum)))

    def epsilon(self, value):
        """Adds `value` to each entry.

        Raises:
            InputError: `value` is not a positive number.
        """
        return self._transformed("epsilon", _check_number(value, "value"), lambda f: f + np.float32(value))

    def normalise(self):
        """Divides all entries by one number, so that their mean over all weights is 1.

        Raises:
            InputError: all entries are 0.
        """
        total = sum(float(array.sum(dtype="float64")) for array in self.values())
        mean = total / sum(array.size for array in self.values())
        if not mean > 0:
            raise InputError("This Fisher diagonal cannot be normalised, because all its entries are 0.")
        return self._transformed("normalise", mean, lambda f: (f / mean).astype("float32"))

    def _transformed(self, name, value, function):
        provenance = {**self.provenance, "transforms": [*self.provenance["transforms"], {"name": name, "value": value}]}
        return Fisher({key: function(array) for key, array in self.items()}, provenance, self._statistics)


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
        return {layer: _relative_error(*sums) for layer, sums in self.statistics().items()}

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


def _header(metadata, path):
    """The provenance and the statistics in the metadata of a file, checked."""
    what = f"The Fisher diagonal in {path} is damaged"
    provenance = parse_json(metadata.get("provenance", ""), what)
    statistics = parse_json(metadata.get("statistics", ""), what, finite=False)  # the sums of huge entries overflow
    with refusing(what):
        counts = [count for batches, images, _, _ in statistics.values() for count in (batches, images)]
        numbers = [number for sums in statistics.values() for number in sums]
        if not all(type(number) in (int, float) for number in numbers) or not all(0 < count < math.inf for count in counts):
            raise ValueError("its statistics are no sums over images")
        if not PROVENANCE.issubset(provenance) or type(provenance["images"]) is not int or provenance["images"] < 1:
            raise ValueError("its provenance lacks a field, or has no number of images")
        if provenance["mode"] not in MODES or not isinstance(provenance["transforms"], list):
            raise ValueError("its provenance has no mode or no list of transforms")
        hashes = provenance.get("weights", {})
        if not isinstance(hashes, dict) or not all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes.values()):
            raise ValueError("the weights of its provenance have no sha256 each")
    return provenance, statistics


def _relative_error(batches, images, first, second):
    """The relative standard error of `Fisher.standard_error` from M, N, sum_b n_b t_b and sum_b n_b t_b²."""
    if batches < 2:
        return math.inf
    if first == 0:
        return 0.0
    variance = max(second - first**2 / images, 0) / (batches - 1)
    return math.sqrt(variance / images) / (first / images)


def _check_number(value, name):
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"{name} is {value!r}: give a finite number above 0.")
    return float(value)


def _check_arguments(mode, samples, seed, first, tolerance):
    if mode not in MODES:
        raise InputError(f"The mode is {mode!r}: choose one of {', '.join(MODES)}.")
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0), ("first", first, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
            raise InputError(f"{name} is {value!r}: give an integer that is at least {least}.")
    if mode == "exact" and samples != 1:
        raise InputError(f"samples is {samples}, but the mode 'exact' draws nothing: leave it at 1.")
    if tolerance is not None:
        _check_number(tolerance, "tolerance")


def _merge(a, b):
    """Two values of a provenance as one: themselves if equal, else a list."""
    if a == b:
        return a
    return [*(a if isinstance(a, list) else [a]), *(b if isinstance(b, list) else [b])]
