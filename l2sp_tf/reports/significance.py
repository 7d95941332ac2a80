"""Whether one method is better than another: exact tests on runs and on test images."""

import math

import numpy as np
from scipy import stats

from l2sp_tf.files.errors import InputError

MOST_COUNTED = 200_000  # ways to name the runs; beyond them a sample is drawn
SAMPLED = 99_999


def permutation_test(a, b):
    """The p-value of a difference in mean accuracy between two methods, from repeated runs.

    Under the null hypothesis it is chance which runs carry which name, so |mean(a) - mean(b)| is
    compared with its value under every way to name them: exact, two-sided, and without a
    normal distribution. The smallest p-value of five runs a side is 2 / 252 = 0.008. Where there are more than
    `MOST_COUNTED` ways, `SAMPLED` of them are drawn, always the same, and the smallest p-value is 1 / (SAMPLED + 1).

    Args:
        a, b: the accuracies of the runs of each method.

    Raises:
        InputError: a side has fewer than two runs.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if min(a.size, b.size) < 2:
        raise InputError(f"{a.size} runs cannot be compared with {b.size}: give at least two of each.")
    resamples = np.inf if math.comb(a.size + b.size, a.size) <= MOST_COUNTED else SAMPLED

    def distance(x, y, axis):
        return abs(x.mean(axis=axis) - y.mean(axis=axis))

    options = {"vectorized": True, "n_resamples": resamples, "batch": 10_000, "rng": np.random.default_rng(0)}
    return float(stats.permutation_test((a, b), distance, alternative="greater", **options).pvalue)


def holm(p_values):
    """The p-values of several comparisons, corrected so that one false finding among them all is as unlikely as in one.

    Holm's step-down method (1979): the i-th smallest of m is multiplied by m - i + 1, and none becomes smaller than the
    one before it.

    Args:
        p_values: numbers from 0 to 1.

    Returns:
        A float array [m], in the same order.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1)
    return corrected


def mcnemar_test(right_a, right_b):
    """The p-value of a difference between two classifiers on the same test images: McNemar's exact test.

    Of the images that only one of them gets right, each is as likely to be one's as the other's
    under the null hypothesis: a two-sided binomial test.

    Args:
        right_a, right_b: bool [n], which images each classifier gets right.

    Raises:
        InputError: the two are not of the same length.
    """
    right_a, right_b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    if right_a.shape != right_b.shape or right_a.ndim != 1:
        raise InputError(f"Answers of shapes {right_a.shape} and {right_b.shape} are not on the same images: give two of one.")
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def worst_beats_best(better, worse):
    """The paper's criterion (section 4.3.1): the worst run of one method against the best run of another.

    The paper has "classical pairwise tests at the 5% level" and does not name one; for two
    classifiers on one test set McNemar's is the classical one.

    Args:
        better, worse: for each run of a method a bool [n], which test images it gets right.

    Returns:
        (whether the worst run of `better` has the higher accuracy, the p-value of McNemar's test).
    """
    worst, best = min(better, key=np.mean), max(worse, key=np.mean)
    return bool(np.mean(worst) > np.mean(best)), mcnemar_test(worst, best)
