"""What a learned method adds to its closed form: how the scores of components are learned.

The components of all modules are taken together: K scores s >= 0. Like a method, a Learner touches
no model, no file and chooses no device; the driver is in driver.py.
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
    """The rules of one method; the fields are hyper-parameters, as a function's keywords are.

    ``progress`` is the share of the steps that are done, from 0 to 1. ``strength`` [K] is σ of a
    component over that of the last one that uniform ranks keep in its module: the components of
    strength 1 and more are the uniform truncation.

    Args:
        epochs, batch_size, learning_rate, precision: of the training (trainer.py).
    """

    epochs: PositiveInt = 6
    batch_size: PositiveInt = 2
    learning_rate: PositiveFloat = 0.03
    precision: Precision = "bfloat16"

    def training(self, seed: int) -> Training:
        """Never stops early: the first stages are worse than what comes of them."""
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
        """The first scores [K]; their order must be that of uniform ranks."""

    def reach(self, strength: Tensor) -> Tensor:
        """How far a score moves where another one moves by 1 [K]."""
        return torch.ones_like(strength)

    @abstractmethod
    def amplitudes(self, scores: Tensor, progress: float) -> Tensor:
        """What each component is multiplied by while training [K]; a gradient passes."""

    @abstractmethod
    def penalty(self, scores: Tensor, price: Tensor, keep: float, progress: float) -> Tensor:
        """Added to the KL divergence, in units of that of uniform truncation.

        Args:
            price: what a component stores over the dense parameters of the whole model [K].
            keep: κ, below 1.
        """

    @abstractmethod
    def order(self, scores: Tensor, strength: Tensor) -> Tensor:
        """The greatest stay [K]."""

    @abstractmethod
    def kept(self, scores: Tensor) -> Tensor:
        """What those that stay are multiplied by in the end [K]."""


def weighted(factors: Factors, gram: Tensor | None) -> Factors:
    """The same components with σ as the norms of the columns of ``factor_out``.

    Args:
        factors: a pair with orthonormal ``factor_out``.
        gram: the metric of σ; None for that of the weight itself.
    """
    inner = factors.factor_in
    energy = ((inner if gram is None else inner @ gram.double()) * inner).sum(dim=1)
    sigma = energy.clamp_min(0).sqrt()
    sigma = sigma.clamp_min(torch.finfo(torch.float32).eps * float(sigma.max()))
    sigma = sigma.where(sigma > 0, torch.ones_like(sigma))
    return Factors(inner / sigma[:, None], factors.factor_out * sigma)
