"""Whether one method is better than another: exact tests on runs and on test images."""

import itertools
import math
import statistics

import numpy as np
from scipy import stats

from l2sp_tf.errors import InputError

MAX_SPLITS = 200_000


def permutation_test(a, b):
    """The p-value of a difference in mean accuracy between two methods, from repeated runs.

    Under the null hypothesis it is chance which runs carry which name, so |mean(a) - mean(b)| is
    compared with its value under every way to name them: exact, two-sided, and without a
    normal distribution. The smallest p-value of five runs a side is 2 / 252 = 0.008.

    Args:
        a, b: the accuracies of the runs of each method.

    Raises:
        InputError: a side is empty, or there are too many ways to count.
    """
    a, b = list(a), list(b)
    if not a or not b:
        raise InputError(f"{len(a)} runs cannot be compared with {len(b)}: give at least one of each.")
    runs = a + b
    count = math.comb(len(runs), len(a))
    if count > MAX_SPLITS:
        raise InputError(f"{len(a)} and {len(b)} runs can be named in more than {MAX_SPLITS:,} ways: give fewer.")
    observed, total = abs(statistics.fmean(a) - statistics.fmean(b)), sum(runs)
    extreme = 0
    for chosen in itertools.combinations(runs, len(a)):
        difference = sum(chosen) / len(a) - (total - sum(chosen)) / len(b)
        extreme += abs(difference) >= observed - 1e-12
    return extreme / count


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
