"""Matches the weights of a model to known ones: names are a hint, values and shapes are evidence."""

import dataclasses
import math
import re

import numpy as np

from l2sp_tf.files.errors import InputError
from l2sp_tf.penalties.assignment import assign
from l2sp_tf.penalties.likeness import EQUAL, are_equal, doubts, related
from l2sp_tf.penalties.weights import keyed_weights

ANYTHING = ("functional", "sequential")  # Keras' default names of models: no evidence of their content

DEEPEST = 64  # deeper layers are merged into one name


@dataclasses.dataclass(frozen=True)
class Matching:
    """The matches of weights with known ones, and the evidence against them.

    Attributes:
        pairs: a dict from key to known key of the same shape. A known key may serve several weights.
        other_shape: a dict from key to the known key of the same name but another shape.
        conflicts: a dict from key to the known key with its values, if its name matches another one of that shape.
        ambiguous: a dict from key to several candidates with different values; these keys are not in `pairs`.
        doubts: a dict from key to ||w - w0|| / ||w0||, for pairs with unrelated values.
    """

    pairs: dict
    other_shape: dict
    conflicts: dict
    ambiguous: dict
    doubts: dict

    def refuse(self, keys=None):
        """Raises InputError if one of the keys (by default all) is in conflict or ambiguous."""
        for key in self.conflicts if keys is None else [key for key in keys if key in self.conflicts]:
            raise InputError(
                f"{key} has the values of {self.conflicts[key]}, but the name of {self.pairs[key]}, which has the same shape: "
                "load the weights into the layers that they belong to, or name the layers as they were."
            )
        for key in self.ambiguous if keys is None else [key for key in keys if key in self.ambiguous]:
            candidates = self.ambiguous[key]
            more = f" and {len(candidates) - 3} more" if len(candidates) > 3 else ""
            raise InputError(
                f"{key} may be any of {', '.join(candidates[:3])}{more}, which differ: name its layer as it was, "
                "or load the weights that it started from."
            )

    def warning(self, keys=None):
        """Returns one sentence that names the doubtful pairs among the keys (by default all), or None."""
        doubtful = [key for key in self.doubts if keys is None or key in keys]
        if not doubtful:
            return None
        named = [f"{key} (||w - w0|| = {self.doubts[key]:.2g} ||w0||)" for key in doubtful[:3]]
        more = f" and {len(doubtful) - 3} more" if len(doubtful) > 3 else ""
        return (
            f"The values of {', '.join(named)}{more} have nothing to do with their anchors: load the pre-trained weights, "
            "or name the layers that are new in attach(new=...)."
        )


def match(weights, known, *, values=True):
    """Finds the known weight of each weight of a model.

    Evidence in order of precedence:
    - Values. A layer matches the known layer whose arrays are bit-equal to its own, or clearly related to them. If its name
      is not a counter and matches another known layer of the same shape, the two conflict.
    - Names. Layers match if their paths are equal, or if one path ends with the other. The anchors of a backbone thus match
      a model that nests it, once or several times, and vice versa.
    - Order. Names that end with a number ("conv2d_7", "functional_3") may be counters. They match by equal numbers, by a
      shift of all numbers, or by rank. The way with the most numbers in related arrays wins, then with the most in arrays
      of equal shape. Equal numbers win ties.

    Args:
        weights: a mapping from key to array, to shape or to `Weight`, such as `keyed_weights` returns.
        known: the same for the anchors, or for another model.
        values: whether values are evidence; False uses names and shapes alone, as for a model to be restored.

    Returns:
        A `Matching`.
    """
    if values:
        weights, known = ({key: _array(value) for key, value in side.items()} for side in (weights, known))
    names = _Names(weights, known, related(weights, known) if values else {})

    def differ(keys):
        return any(key != keys[0] and not (values and are_equal(known[key], known[keys[0]])) for key in keys)

    found = Matching({}, {}, {}, {}, {})
    for layer in names.root.walk():
        _decide(layer, names, found, differ)
    if values:
        found.doubts.update(doubts({key: (weights[key], known[other]) for key, other in found.pairs.items()}))
    ordered = ({key: part[key] for key in weights if key in part} for part in vars(found).values())
    return Matching(*ordered)


class _Layer:
    """A layer in a tree of layers: its path, its weights (key by name), and its children by stem and number."""

    def __init__(self, path):
        self.path, self.weights, self.children, self.groups = path, {}, {}, {}

    def counters(self):
        """Returns the stems of children's names that may be counters: those with a number somewhere."""
        return [stem for stem, numbered in self.groups.items() if len(numbered) > 1 or max(numbered) > 0]

    def walk(self):
        """Yields this layer and all below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def _tree(keys):
    """Returns the root of the tree of layers that the keys name, independent of their order."""
    root = _Layer(())
    for key in sorted(keys, key=_natural):
        *path, name = key.split("/")
        name, mark, number = name.partition("#")
        path[DEEPEST:] = ["/".join(path[DEEPEST:])] if len(path) > DEEPEST else []
        if path:
            path[-1] += mark + number  # "twin/kernel#2" is the kernel of a second layer called twin
        layer = root
        for part in path:
            layer = layer.children.setdefault(part, _Layer((*layer.path, part)))
        layer.weights[name if path else key] = key
    for layer in root.walk():
        for name, child in layer.children.items():
            stem, number = _split(name)
            numbered = layer.groups.setdefault(stem, {})
            # "x" counts as "x_0"; if "x_0" exists too, "x" comes before it
            numbered[-1 if number is None and f"{name}_0" in layer.children else number or 0] = child
    return root


def _split(name):
    """Splits a name into its stem and number, or None: "conv2d_7" gives ("conv2d", 7)."""
    match = re.fullmatch(r"(.*?)(?:_(0|[1-9][0-9]{0,17}))?(#[0-9]+)?", name, re.DOTALL)  # untrusted files may hold any name
    return match[1] + (match[3] or ""), None if match[2] is None else int(match[2])


def _natural(key):
    """Returns a sort key that orders numbers inside names by value."""
    return [(bool(n), int(n or 0), text) for text, n in re.findall(r"([^0-9]+)|([0-9]{1,18})", key)]


class _Names:
    """Matches two trees of layers by names, order and shapes; related values decide between equal choices."""

    def __init__(self, weights, known, related):
        self.shapes, self.known_shapes = ({key: _shape(value) for key, value in side.items()} for side in (weights, known))
        self.root, self.known_root, self.related = _tree(weights), _tree(known), related
        self.owner = {key: layer for layer in self.known_root.walk() for key in layer.weights.values()}
        self._shapes, self._numbers, self._ties, self._aligned, self._most = {}, {}, {}, {}, {}
        self._measure()
        self._counters = {stem for root in (self.root, self.known_root) for layer in root.walk() for stem in layer.counters()}
        self._candidates = {}
        self._nest()
        self._rename()

    def of(self, layer):
        """Returns the known layer that matches by name, or None, and a list of its rivals."""
        candidates = self._candidates.get(id(layer), [])
        if not candidates:
            return None, []
        exact = [
            other
            for *_, other in candidates
            if other.path == layer.path and self.is_explicit(layer, other) and self.own(layer, other)[1]
        ]
        if exact:
            return exact[0], []
        best = min(rank for rank, _, _ in candidates)
        equals = [(is_rival, other) for rank, is_rival, other in candidates if rank == best]
        named = next(other for is_rival, other in sorted(equals, key=lambda pair: pair[0]))
        return named, [other for _, other in equals if other is not named]

    def is_explicit(self, layer, other):
        """Whether two layers have the same name without counters in it."""
        parts = list(zip(reversed(layer.path), reversed(other.path), strict=False))
        return bool(parts) and all(a == b and _split(a)[0] not in self._counters for a, b in parts)

    def own(self, layer, other):
        """Returns the score of two layers' own weights: their relation, and the size of those with equal name and shape."""
        shapes = self._shapes[id(layer)], self._shapes[id(other)]
        if shapes not in self._numbers:
            self._numbers[shapes] = sum(math.prod(shape) for _, shape in shapes[0] & shapes[1])
        return self._ties[id(layer)].get(id(other), 0), self._numbers[shapes]

    def _measure(self):
        """Stores the names and shapes of each layer's weights, and its relation to known layers."""
        for root, shapes in ((self.root, self.shapes), (self.known_root, self.known_shapes)):
            for layer in root.walk():
                self._shapes[id(layer)] = frozenset((name, shapes[key]) for name, key in layer.weights.items())
        for layer in self.root.walk():
            ties = self._ties.setdefault(id(layer), {})
            for name, key in layer.weights.items():
                for known_key, strength in self.related.get(key, {}).items():
                    other = self.owner[known_key]
                    if other.weights.get(name) == known_key:
                        ties[id(other)] = ties.get(id(other), 0) + self._score(key, strength)[0]

    def _score(self, key, strength):
        size = math.prod(self.shapes[key])
        return round(1000 * size * min(strength, 1)), size

    def _align(self, layer, other):
        """Returns the score of two subtrees and, for each group of children, the pairings that reach it."""
        if not layer.children or not other.children:
            return self.own(layer, other), []
        pair = id(layer), id(other)
        if pair not in self._aligned:
            score, groups = self.own(layer, other), []
            for stem in layer.groups.keys() & other.groups.keys():
                added, ways = self._by_number(layer.groups[stem], other.groups[stem])
                score = _sum([score, added])
                groups.append(ways)
            self._aligned[pair] = score, groups
        return self._aligned[pair]

    def _by_number(self, numbered, others):
        """Returns the best score of two groups of numbered siblings, and the pairings that reach it, the preferred one first."""

        def score(n, m):
            return self._align(numbered[n], others[m])[0]

        numbers, known_numbers = sorted(numbered), sorted(others)
        same = [(n, n) for n in numbers if n in others]
        total = _sum(score(n, n) for n, _ in same)
        if total == _sum(self._best_below(numbered[n]) for n in numbers):
            return total, [[(numbered[n], others[n]) for n, _ in same]]
        scores = {(n, m): score(n, m) for n in numbers for m in known_numbers}
        first = known_numbers[0] - numbers[0]
        by_shift = {0: [], first: []}
        for n, m in scores:
            if scores[n, m][1]:
                by_shift.setdefault(m - n, []).append((n, m))
        order = sorted(by_shift, key=lambda shift: (shift != 0, abs(shift - first), shift))
        ways = [by_shift[shift] for shift in order]
        ways.append([pair for pair in zip(numbers, known_numbers, strict=False) if scores[pair][1]])
        totals = [_sum(scores[pair] for pair in way) for way in ways]
        best = max(totals)
        ways = [way for way, total in zip(ways, totals, strict=True) if total == best]
        if total == best or len(ways[0]) == len(numbers) == len(known_numbers):
            ways = [same if total == best else ways[0]]  # ties go to equal names, or to a complete pairing in order
        return best, [[(numbered[n], others[m]) for n, m in way] for way in ways]

    def _best_below(self, layer):
        """Returns the highest score that a subtree can have."""
        if id(layer) not in self._most:
            own = [self._score(key, max(self.related.get(key, {}).values(), default=0)) for key in layer.weights.values()]
            self._most[id(layer)] = _sum([*own, *(self._best_below(child) for child in layer.children.values())])
        return self._most[id(layer)]

    def _nest(self):
        """Collects candidates from the two models, and from each nested in the other."""
        self._collect(self.root, self.known_root)
        if self.root.children and self.known_root.children:  # a single layer cannot be nested as a model
            for layer in _nested(self.root):
                self._collect(layer, self.known_root)
            for other in _nested(self.known_root):
                self._collect(self.root, other)

    def _rename(self):
        """Collects candidates for unmatched layers from renamed nested models: related by values, or named by Keras."""
        named = {key for key, candidates in self._candidates.items() if any(not rank[0] for rank, _, _ in candidates)}
        nameless = {id(layer) for layer in self.root.walk() if layer.weights} - named
        for layer in _nested(self.root):
            if any(id(below) in nameless for below in layer.walk()):
                for other in _nested(self.known_root):
                    related, numbers = self._align(layer, other)[0]
                    is_auto = any(_split(each.path[-1])[0] in ANYTHING for each in (layer, other))
                    if (related or is_auto) and 2 * numbers >= self._best_below(layer)[1]:
                        self._collect(layer, other, only=nameless)

    def _collect(self, layer, other, only=None):
        score = self._align(layer, other)[0]
        rank = -score[0], -score[1], len(layer.path) + len(other.path)
        for below, candidate, is_rival in self._pairs_below(layer, other):
            if only is None or id(below) in only:
                misfit = self.own(below, candidate)[1] == 0
                self._candidates.setdefault(id(below), []).append(((misfit, *rank), is_rival, candidate))

    def _pairs_below(self, layer, other):
        """Yields all pairs of layers in two aligned subtrees, and whether another pairing is preferred."""
        yield layer, other, False
        for ways in self._align(layer, other)[1]:
            for number, way in enumerate(ways):
                for a, b in way:
                    for below, candidate, is_rival in self._pairs_below(a, b):
                        yield below, candidate, is_rival or number > 0


def _nested(root):
    """Returns the nested models: layers below the root that have children."""
    return [layer for layer in root.walk() if layer is not root and layer.children]


def _sum(scores):
    related, numbers = 0, 0
    for score in scores:
        related, numbers = related + score[0], numbers + score[1]
    return related, numbers


def _decide(layer, names, found, differ):
    """Adds the weights of one layer to the matching `found`."""
    other, rivals = names.of(layer)
    related, numbers = (0, 0) if other is None else names.own(layer, other)
    same, is_equal = _descent(layer, names)
    if same and (other in same or related and not is_equal):
        rivals = [] if is_equal else [rival for rival in rivals if rival in same]
    elif same and numbers and names.is_explicit(layer, other):
        found.conflicts.update(_paired(layer, same[0], names)[0])
    elif same:
        other, rivals = same[0], ([] if is_equal else same[1:])
    if other is None:
        return
    pairs, other_shape = _paired(layer, other, names)
    found.other_shape.update(other_shape)
    for key, known_key in pairs.items():
        name = known_key.rpartition("/")[2].partition("#")[0]
        keys = [known_key, *(rival.weights[name] for rival in rivals if name in rival.weights)]
        keys = [other_key for other_key in keys if names.known_shapes[other_key] == names.shapes[key]]
        if differ(keys):
            found.ambiguous[key] = tuple(sorted(keys, key=_natural))
        else:
            found.pairs[key] = known_key


def _paired(layer, other, names):
    """Pairs equally named weights of two layers: dicts from key to known key, of equal shape and of another shape."""
    both = [(key, other.weights[name]) for name, key in layer.weights.items() if name in other.weights]
    same = {key: known for key, known in both if names.shapes[key] == names.known_shapes[known]}
    return same, {key: known for key, known in both if key not in same}


def _descent(layer, names):
    """Returns the known layers with a layer's values, and whether they are bit-equal. Most of its numbers must agree.

    Without bit-equality only kernels are evidence: statistics of consecutive layers are alike.
    """
    for is_equal in (True, False):
        total, scores = 0, {}
        for name, key in layer.weights.items():
            if key in names.related and (is_equal or len(names.shapes[key]) >= 2):
                size = math.prod(names.shapes[key])
                total += size
                for known_key, strength in names.related[key].items():
                    other = names.owner[known_key]
                    if other.weights.get(name) == known_key and (strength == EQUAL or not is_equal):
                        scores[other] = scores.get(other, 0) + size * min(strength, 1)
        best = max(scores.values(), default=0)
        if best and 2 * best >= total:
            worst = best if is_equal else best - (total - best)  # a layer twice as far as the nearest is another one
            near = [other for other, score in scores.items() if score >= worst]
            return sorted(near, key=lambda other: (-scores[other], _natural("/".join(other.path)))), is_equal
    return [], False


def _shape(value):
    value = getattr(value, "variable", value)
    return tuple(getattr(value, "shape", value))


def _array(value):
    return value.variable.numpy() if hasattr(value, "variable") else np.asarray(value)


def restore(model, arrays):
    """Assigns arrays to the matching weights of a model; its layers then update the state derived from them.

    Args:
        model: a built model.
        arrays: a mapping from the key of each weight to its array.

    Raises:
        InputError: weights are missing on one side, or shapes differ. The message lists both sides; the model is
            unchanged.
    """
    weights = keyed_weights(model)
    found = match(weights, arrays, values=False)  # the model still holds other values
    wrong = [
        f"{key} {tuple(weight.variable.shape)} / {_partner(key, found, arrays)}"
        for key, weight in weights.items()
        if key not in found.pairs
    ]
    ambiguous = (key for keys in found.ambiguous.values() for key in keys)
    named = {*found.pairs.values(), *found.other_shape.values(), *ambiguous}
    wrong += [f"missing / {key} {arrays[key].shape}" for key in arrays if key not in named]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(
            f"These weights are not of the architecture of the model {model.name!r} "
            f"(model / weights: {'; '.join(wrong[:5])}{more}): choose the architecture they were made with."
        )
    assign(model, {key: arrays[other] for key, other in found.pairs.items()})


def _partner(key, found, arrays):
    """Describes the counterpart of a weight without a partner of its shape."""
    if key in found.ambiguous:
        return f"any of {', '.join(found.ambiguous[key])}"
    return arrays[found.other_shape[key]].shape if key in found.other_shape else "missing"
