"""BLEU and chrF from sums of sufficient statistics, for thousands of resamples at once.

The statistics come from `metrics/bleu.py` and `metrics/chrf.py`; a test holds both functions to sacrebleu's own values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BLEU_COLUMNS = 10
CHRF_COLUMNS = 18


def bleu(sums: Floats) -> Floats:
    """Corpus BLEU 0..100 of `[..., 10]` sums (reply words, reference words, matches 1..4, totals 1..4) -> `[...]`; NaN without a
    word of a reference.

    Exponential smoothing as in NIST's mteval-v13a: the k-th order without a match counts as 1 / (2^k · total).
    """
    reply, reference = sums[..., 0], sums[..., 1]
    match, total = sums[..., 2:6], sums[..., 6:10]
    with np.errstate(divide="ignore", invalid="ignore"):
        missing = (match == 0) & (total > 0)
        smooth = 2.0 ** np.cumsum(missing, axis=-1)
        precision = np.where(missing, 100.0 / (smooth * total), 100.0 * match / total)
        defined = np.logical_and.accumulate(total > 0, axis=-1)
        logs = np.where(defined, np.log(precision), -np.inf).mean(axis=-1)
        brevity = np.where(reply < reference, np.exp(1 - reference / reply), 1.0)
        score = brevity * np.exp(logs)
    return np.where(reference == 0, np.nan, np.where((match.sum(axis=-1) == 0) | (reply == 0), 0.0, score))


def chrf(sums: Floats) -> Floats:
    """Corpus chrF2 0..100 of `[..., 18]` sums ((reply, reference, match) of character orders 1..6) -> `[...]`; NaN without a
    character of a reference."""
    triples = sums.reshape(*sums.shape[:-1], 6, 3)
    reply, reference, match = triples[..., 0], triples[..., 1], triples[..., 2]
    used = (reply > 0) & (reference > 0)
    orders = used.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(used, match / reply, 0.0).sum(axis=-1) / orders
        recall = np.where(used, match / reference, 0.0).sum(axis=-1) / orders
        score = 100.0 * 5.0 * precision * recall / (4.0 * precision + recall)
    return np.where(reference[..., 0] == 0, np.nan, np.where((orders == 0) | (precision + recall == 0), 0.0, score))
