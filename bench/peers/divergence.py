"""How far two engines' next-token distributions lie apart.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Loss:
    """Kullback-Leibler divergence of each token's distribution from the reference, in nats, over all tokens.

    `top_agreement` is the share of tokens whose likeliest successor is the reference's.
    """

    kl_T: np.ndarray
    top_T: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.kl_T.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, tokens taken as independent."""
        return float(self.kl_T.std(ddof=1) / math.sqrt(len(self.kl_T)))

    @property
    def median(self) -> float:
        return float(np.median(self.kl_T))

    @property
    def percentile_99(self) -> float:
        return float(np.percentile(self.kl_T, 99))

    @property
    def top_agreement(self) -> float:
        return float(self.top_T.mean())

    def excess_over(self, other: Loss) -> tuple[float, float]:
        """Mean of the differences to `other`, token by token, and its standard error."""
        gaps = self.kl_T - other.kl_T
        return float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(len(gaps)))


def loss(reference_TV: np.ndarray, scores_TV: np.ndarray, *, rows_at_once: int = 64) -> Loss:
    """The loss of `scores_TV` against `reference_TV`, both unnormalised log-probabilities; computed in float64."""
    if reference_TV.shape != scores_TV.shape:
        raise ValueError(f"scores of shape {scores_TV.shape} cannot be held against {reference_TV.shape}")
    kl, top = [], []
    for start in range(0, len(reference_TV), rows_at_once):
        rows = slice(start, start + rows_at_once)
        expected, found = _log_softmax(reference_TV[rows]), _log_softmax(scores_TV[rows])
        kl.append((np.exp(expected) * (expected - found)).sum(-1))
        top.append(expected.argmax(-1) == found.argmax(-1))
    return Loss(np.concatenate(kl), np.concatenate(top))


def _log_softmax(scores_TV: np.ndarray) -> np.ndarray:
    shifted = scores_TV.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
