"""Is a difference between two methods real? A paired t-test over seeds.

Runs of one seed share random numbers (block 0 and the end-to-end network even see the same batches), so their scores
are not independent. The difference is taken within each seed, and the test looks only at these few numbers (Student
1908).
"""

import math
import statistics

import numpy as np


def paired(ours, theirs):
    """Mean difference ours - theirs, its standard error, and p. Two lists of one number per seed, of equal length >= 2.

    p is the probability of a mean difference at least as large, in either direction, if the methods were equally good.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return mean, error, float(mean == 0)
    return mean, error, student_p(mean / error, len(differences) - 1)


def student_p(t, freedom):
    """P(|T| >= |t|) of Student's distribution with `freedom` degrees of freedom.

    With t = sqrt(freedom) tan(a) its density is proportional to cos(a) ** (freedom - 1), which is smooth and bounded:
    the midpoint rule will do.
    """
    middles = (np.arange(10_000) + 0.5) / 10_000

    def tail(angle):
        return (math.pi / 2 - angle) * np.mean(np.cos(angle + (math.pi / 2 - angle) * middles) ** (freedom - 1))

    return float(tail(math.atan(abs(t) / math.sqrt(freedom))) / tail(0.0))
