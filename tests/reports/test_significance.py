"""Checks the tests between methods: against SciPy, by hand, and by how often they are wrong without a difference."""

import fractions
import itertools

import numpy as np
import pytest
from scipy import stats

from l2sp_tf.files.errors import InputError
from l2sp_tf.reports import significance


def counted(a, b):
    """Counts in which share of all assignments of the runs the means differ at least as much."""
    runs, observed = [*a, *b], abs(mean_of(a) - mean_of(b))
    ways = list(itertools.combinations(range(len(runs)), len(a)))
    others = [[i for i in range(len(runs)) if i not in way] for way in ways]
    pairs = zip(ways, others, strict=True)
    distances = [abs(mean_of(runs[i] for i in way) - mean_of(runs[i] for i in rest)) for way, rest in pairs]
    return sum(distance >= observed for distance in distances) / len(ways)


def mean_of(values):
    """Computes the exact mean of numbers of two decimals: floats that differ in the last bit would break ties."""
    values = [fractions.Fraction(round(100 * float(value)), 100) for value in values]
    return sum(values) / len(values)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 4), (2, 6), (2, 2)])
def test_permutation_test_counts_every_assignment_of_the_runs(n, m):
    rng = np.random.default_rng(n)
    a, b = np.round(rng.normal(0.3, 1, n), 2), np.round(rng.normal(0, 1, m), 2)
    assert significance.permutation_test(a, b) == pytest.approx(counted(a, b))
    ties = [0.5] * (n - 1) + [0.7], [0.5] * (m - 1) + [0.7]
    assert significance.permutation_test(*ties) == pytest.approx(counted(*ties))


def test_of_twelve_runs_a_side_a_sample_is_drawn():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.9, 1, 12), rng.normal(0, 1, 12)
    p = significance.permutation_test(a, b)
    # a sum over many ways is nearly normal: the error of Student's t is far below the tolerance here
    expected, share = stats.ttest_ind(a, b).pvalue, significance.SAMPLED + 1
    assert abs(p - expected) < 0.1 * expected + 4 * np.sqrt(expected / share)
    assert p == significance.permutation_test(a, b)
    assert significance.permutation_test(a, a + 100) == pytest.approx(1 / share)
    assert significance.permutation_test([0.5] * 12, [0.5] * 12) == 1


def test_several_comparisons_are_corrected_as_holm_says():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.6, 0.9]) == pytest.approx([1, 1])
    assert significance.holm([]).size == 0 and significance.holm([0.2]) == pytest.approx([0.2])
    p = np.random.default_rng(0).uniform(size=(2000, 5))
    wrong = sum((significance.holm(row) <= 0.05).any() for row in p)  # no difference is real
    assert wrong < 2000 * 0.05 + 4 * np.sqrt(2000 * 0.05 * 0.95)


def test_five_runs_that_do_not_overlap_are_different_and_equal_ones_are_not():
    assert significance.permutation_test([0.1, 0.2, 0.3, 0.4, 0.5], [0.6, 0.7, 0.8, 0.9, 1.0]) == pytest.approx(2 / 252)
    assert significance.permutation_test([0.5] * 5, [0.5] * 5) == 1


def test_permutation_test_keeps_its_level():
    rng = np.random.default_rng(0)
    rejected = sum(significance.permutation_test(*rng.normal(size=(2, 4))) <= 0.05 for _ in range(1000))
    level = 2 / 70  # the largest reachable level below 5% with four runs a side
    assert abs(rejected - 1000 * level) < 4 * np.sqrt(1000 * level * (1 - level))


def test_mcnemar_is_the_binomial_tail_of_the_discordant_images():
    a = np.array([1] * 8 + [0] * 1 + [1] * 20 + [0] * 10, bool)
    b = np.array([0] * 8 + [1] * 1 + [1] * 20 + [0] * 10, bool)
    assert significance.mcnemar_test(a, b) == pytest.approx(2 * (1 + 9) / 2**9)
    assert significance.mcnemar_test(a, b) == significance.mcnemar_test(b, a)
    assert significance.mcnemar_test(a, a) == 1


def test_the_worst_run_is_held_against_the_best():
    n = 100
    runs = {count: np.arange(n) < count for count in (50, 60, 80, 90)}
    higher, p = significance.worst_beats_best([runs[90], runs[80]], [runs[50], runs[60]])
    assert higher and p == pytest.approx(2 * 0.5**20)
    assert not significance.worst_beats_best([runs[90], runs[50]], [runs[60]])[0]


def test_methods_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="0 runs"):
        significance.permutation_test([], [1, 2])
    with pytest.raises(InputError, match="1 runs"):
        significance.permutation_test([1], [1, 2])
    with pytest.raises(InputError, match="same images"):
        significance.mcnemar_test([True], [True, False])
