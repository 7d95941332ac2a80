"""The forward pass of a model, traced so that each layer notes where its weights enter."""

import contextlib
import typing

import keras
import tensorflow as tf

from l2sp_tf.files.errors import InputError
from l2sp_tf.fisher.layer_rules import Dense, attribute, in_full_precision, rule_for, substitute


class Site(typing.NamedTuple):
    """A place where weights enter a model: the `Rule` of the layer, its input x, and its output z before the activation."""

    rule: typing.Any
    x: tf.Tensor | None
    z: tf.Tensor


class OneImage:
    """The rule for a weight itself, as z, in a model that gets one image."""

    def __init__(self, variable):
        self.variable = variable

    def squares(self, x, gs):
        return [(self.variable, tf.add_n([tf.square(g) for g in gs]))]


@contextlib.contextmanager
def traced(model, weights, *, by_layer=True):
    """Notes where weights enter while the block traces a model, and lets its layers compute in float32 at least.

    It restores the `call` and the policy of each layer at the end, and assigns no variable.

    Args:
        model: a built Keras model.
        weights: a dict from key to `l2sp_tf.penalties.weights.Weight`: those of interest.
        by_layer: False leaves the layers alone and watches the values of the weights: for a batch of one image.

    Yields:
        A `Trace`.
    """
    with contextlib.ExitStack() as stack:
        tape = stack.enter_context(tf.GradientTape(persistent=True, watch_accessed_variables=False))
        trace = Trace(model, weights, tape, by_layer)
        stack.enter_context(in_full_precision(model))
        if by_layer:
            for layer in {id(w.layer): w.layer for w in weights.values()}.values():
                stack.enter_context(attribute(layer, "call", trace.wrapped(layer)))
        stack.enter_context(trace)
        yield trace


class Trace(keras.StatelessScope):
    """Lists each `Site` of the forward pass in `sites`, and computes the squares of the gradients."""

    def __init__(self, model, weights, tape, by_layer):
        super().__init__()
        self._weights, self._tape, self._graph = weights, tape, tf.compat.v1.get_default_graph()
        self._keys = {id(w.variable): key for key, w in weights.items()}
        self._owners = {id(w.variable): w.layer for w in weights.values()} if by_layer else {}
        self._running, self._called, self._twice, self._stray = [], set(), set(), set()
        own = [] if by_layer else [w.variable for w in weights.values()]
        values = substitute(self, model.variables, own, tape)
        self.sites = [Site(OneImage(v), None, value) for v, value in zip(own, values, strict=True)]

    def wrapped(self, layer):
        """Returns a `call` for the layer that runs the layer's rule and notes the site."""
        rule = rule_for(layer)

        def run(x, *args, **kwargs):
            # a loop traces its body once for all rounds, in its own graph
            again = id(layer) in self._called or tf.compat.v1.get_default_graph() is not self._graph
            (self._twice if again else self._called).add(id(layer))
            self._running.append(layer)
            try:
                z = rule.output(x, *args, **kwargs)
                self._tape.watch(z)
                self.sites.append(Site(rule, x, z))
                return rule.activate(z)
            finally:
                self._running.pop()

        return run

    def get_current_value(self, variable):
        owner = self._owners.get(id(variable))
        if owner is not None and not (self._running and self._running[-1] is owner):
            self._stray.add(self._keys[id(variable)])
        return super().get_current_value(variable)

    def check(self):
        """Checks that each layer was called once, and each weight read by its own layer only.

        Raises:
            InputError: gradients of several uses of a weight add before they are squared; the message
                names each layer or weight.
        """
        shared = list(dict.fromkeys(w.layer.name for w in self._weights.values() if id(w.layer) in self._twice))
        wrong = [f"the layer {name} is called more than once" for name in shared]
        wrong += [f"the weight {key} is used outside its layer" for key in sorted(self._stray)]
        if wrong:
            raise InputError(f"Squares of shared weights' gradients do not add: {'; '.join(wrong[:5])}; pass slow_fallback=True.")

    def closed_form(self, logits, variances):
        """Removes the site of a Dense layer that gives the logits, and returns its squares summed over all cotangents.

        The squares of the columns of a factor of H sum to its diagonal, the `variances` [B, K]. So the kernel
        has sum_b h_bc² H_bkk and the bias sum_b H_bkk, in float64.
        """
        head = next((site for site in self.sites if isinstance(site.rule, Dense) and site.z.name == logits.name), None)
        if head is None or len(head.x.shape) != 2:
            return {}
        self.sites = [site for site in self.sites if site is not head]
        return self._by_key(head.rule.squares(tf.cast(head.x, tf.float64), [tf.sqrt(variances)]))

    def squares(self, logits, cotangents):
        """Sums the squared per-example gradients over the batch and a list of cotangents [B, K] of the logits.

        Returns:
            A dict from key to tensor, without the weights that the logits do not depend on.
        """
        outputs = [site.z for site in self.sites]
        gradients = [self._tape.gradient(logits, outputs, output_gradients=tf.cast(u, logits.dtype)) for u in cotangents]
        found = []
        for site, *gs in zip(self.sites, *gradients, strict=True):
            if gs[0] is not None:
                found += site.rule.squares(site.x, [tf.convert_to_tensor(g) for g in gs])
        return self._by_key(found)

    def _by_key(self, squares):
        return {self._keys[id(v)]: square for v, square in squares if id(v) in self._keys}
