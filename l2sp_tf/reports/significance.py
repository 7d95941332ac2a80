"""Tests whether one method is better than another, exactly: over runs, and over test images."""

import math

import numpy as np
from scipy import stats

from l2sp_tf.files.errors import InputError

MOST_COUNTED = 200_000  # ways to assign the runs to the methods; of more, a sample is drawn
SAMPLED = 99_999


def permutation_test(a, b):
    """Computes the p-value of a difference in mean accuracy between two methods, from repeated runs.

    Under the null hypothesis chance assigns the runs to the methods. So the test compares |mean(a) - mean(b)| with its value
    under every assignment: exactly, two-sided, and without assuming a normal distribution. The smallest p-value of five
    runs each is 2 / 252 = 0.008. Of more than `MOST_COUNTED` assignments the test draws a fixed sample of `SAMPLED`; the
    smallest p-value is then 1 / (SAMPLED + 1).

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
    """Corrects the p-values of several comparisons, so that a false finding among all is as unlikely as in one.

    Holm's step-down method (1979): multiplies the i-th smallest of m by m - i + 1, and raises it to the one before it
    if that is larger.

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
    """Computes the p-value of a difference between two classifiers on the same test images: McNemar's exact test.

    If only one of them is right on an image, then under the null hypothesis it is equally likely to be either. The test is
    a two-sided binomial one.

    Args:
        right_a, right_b: bool [n], which images each classifier gets right.

    Raises:
        InputError: the two have different lengths.
    """
    right_a, right_b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    if right_a.shape != right_b.shape or right_a.ndim != 1:
        raise InputError(f"Answers of shapes {right_a.shape} and {right_b.shape} are not on the same images: give equal lengths.")
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def worst_beats_best(better, worse):
    """Applies the paper's criterion (section 4.3.1): compares the worst run of one method with the best run of another.

    The paper uses "classical pairwise tests at the 5% level", and does not name them. McNemar's is the classical test for two
    classifiers on one test set.

    Args:
        better, worse: for each run of a method a bool [n], which test images it gets right.

    Returns:
        (whether the worst run of `better` has the higher accuracy, the p-value of McNemar's test).
    """
    worst, best = min(better, key=np.mean), max(worse, key=np.mean)
    return bool(np.mean(worst) > np.mean(best)), mcnemar_test(worst, best)
