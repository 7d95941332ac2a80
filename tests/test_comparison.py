"""The tests between methods: against SciPy, by hand, and by how often they are wrong when there is no difference."""

import numpy as np
import pytest
from scipy import stats

from l2sp_tf import comparison
from l2sp_tf.errors import InputError


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 4), (2, 6)])
def test_permutation_test_is_scipys(n, m):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.3, 1, n), rng.normal(0, 1, m)
    difference = {"statistic": lambda x, y: abs(np.mean(x) - np.mean(y)), "alternative": "greater"}
    expected = stats.permutation_test((a, b), **difference, n_resamples=np.inf)
    assert comparison.permutation_test(a, b) == pytest.approx(expected.pvalue)


def test_five_runs_that_do_not_overlap_are_different_and_equal_ones_are_not():
    assert comparison.permutation_test([0.1, 0.2, 0.3, 0.4, 0.5], [0.6, 0.7, 0.8, 0.9, 1.0]) == pytest.approx(2 / 252)
    assert comparison.permutation_test([0.5] * 5, [0.5] * 5) == 1


def test_permutation_test_keeps_its_level():
    rng = np.random.default_rng(0)
    rejected = sum(comparison.permutation_test(*rng.normal(size=(2, 4))) <= 0.05 for _ in range(1000))
    level = 2 / 70  # the largest reachable level below 5% with four runs a side
    assert abs(rejected - 1000 * level) < 4 * np.sqrt(1000 * level * (1 - level))


def test_mcnemar_is_the_binomial_tail_of_the_discordant_images():
    a = np.array([1] * 8 + [0] * 1 + [1] * 20 + [0] * 10, bool)
    b = np.array([0] * 8 + [1] * 1 + [1] * 20 + [0] * 10, bool)
    assert comparison.mcnemar_test(a, b) == pytest.approx(2 * (1 + 9) / 2**9)
    assert comparison.mcnemar_test(a, b) == comparison.mcnemar_test(b, a)
    assert comparison.mcnemar_test(a, a) == 1


def test_the_worst_run_is_held_against_the_best():
    n = 100
    runs = {count: np.arange(n) < count for count in (50, 60, 80, 90)}
    higher, p = comparison.worst_beats_best([runs[90], runs[80]], [runs[50], runs[60]])
    assert higher and p == pytest.approx(2 * 0.5**20)
    assert not comparison.worst_beats_best([runs[90], runs[50]], [runs[60]])[0]


def test_what_cannot_be_compared_is_told():
    with pytest.raises(InputError, match="0 runs"):
        comparison.permutation_test([], [1])
    with pytest.raises(InputError, match="200,000"):
        comparison.permutation_test(range(12), range(12))
    with pytest.raises(InputError, match="same images"):
        comparison.mcnemar_test([True], [True, False])
