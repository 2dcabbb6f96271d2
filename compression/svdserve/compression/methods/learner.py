"""Learners: the rules by which a learned method learns a score for each singular component.

The K components of all modules together have scores s >= 0. Like a method, a Learner accesses no
model and no file and chooses no device; pipeline/stages/learning.py drives it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from svdserve.compression.format.layouts import Factors
from svdserve.compression.system.precision import Precision
from svdserve.compression.training.trainer import Training

_EVALUATIONS = 8


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """The rules of one method; the fields are hyper-parameters of the method.

    In the methods below, ``progress`` is the share of finished steps, from 0 to 1. ``strength`` [K]
    is a component's σ divided by the smallest σ that uniform ranks keep in its module, so uniform
    truncation keeps the components of strength 1 or more.

    Args:
        epochs, batch_size, learning_rate, precision: settings of the training (trainer.py).
    """

    epochs: PositiveInt = 6
    batch_size: PositiveInt = 2
    learning_rate: PositiveFloat = 0.03
    precision: Precision = "bfloat16"

    def training(self, seed: int) -> Training:
        """The settings of the training; it never stops early, as quality may fall at first."""
        return Training(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            precision=self.precision,
            evaluations=_EVALUATIONS,
            patience=_EVALUATIONS + 1,
            seed=seed,
        )

    @abstractmethod
    def start(self, strength: Tensor) -> Tensor:
        """The initial scores [K]; by them the budget must select those of uniform truncation."""

    def reach(self, strength: Tensor) -> Tensor:
        """Relative step sizes of the scores [K]."""
        return torch.ones_like(strength)

    @abstractmethod
    def amplitudes(self, scores: Tensor, progress: float) -> Tensor:
        """Differentiable factors [K] that multiply the components during training."""

    @abstractmethod
    def penalty(self, scores: Tensor, price: Tensor, keep: float, progress: float) -> Tensor:
        """A term added to the KL divergence, in units of the divergence of uniform truncation.

        Args:
            price: stored parameters of a component / dense parameters of all modules [K].
            keep: the keep ratio κ, below 1.
        """

    @abstractmethod
    def order(self, scores: Tensor, strength: Tensor) -> Tensor:
        """Importance of the components [K]; the budget keeps the largest."""

    @abstractmethod
    def kept(self, scores: Tensor) -> Tensor:
        """Factors [K] that multiply the components that are kept in the end."""


def weighted(factors: Factors, gram: Tensor | None) -> Factors:
    """The same components, scaled so that the columns of ``factor_out`` have norm σ.

    Args:
        factors: factors with orthonormal columns of ``factor_out``.
        gram: the Gram matrix [n, n] of the metric of σ; None for the identity.
    """
    inner = factors.factor_in
    energy = ((inner if gram is None else inner @ gram.double()) * inner).sum(dim=1)
    sigma = energy.clamp_min(0).sqrt()
    sigma = sigma.clamp_min(torch.finfo(torch.float32).eps * float(sigma.max()))
    sigma = sigma.where(sigma > 0, torch.ones_like(sigma))
    return Factors(inner / sigma[:, None], factors.factor_out * sigma)
