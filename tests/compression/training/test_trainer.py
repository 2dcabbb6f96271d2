"""The training loop on least squares, where the best parameters are known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from svdserve.compression.format.codecs import FLOAT, Storage
from svdserve.compression.system.errors import UserError
from svdserve.compression.training.trainer import State, Trainer, Training

SEQUENCES, WIDTH = 24, 8


class LeastSquares:
    """‖X w − y‖² / rows, for rows with the given indices; y = X w* exactly."""

    def __init__(self, weight: nn.Parameter) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = weight
        self.inputs = torch.randn(SEQUENCES, WIDTH, generator=generator)
        self.solution = torch.randn(WIDTH, generator=generator)
        self.killed_at: int | None = None
        self.steps: list[int] = []
        self.used: set[int] = set()

    def _loss(self, rows: Tensor) -> Tensor:
        x = self.inputs[rows]
        return (x @ self.weight - x @ self.solution).square().mean()

    def backward(self, rows: Tensor, step: int) -> None:
        if step == self.killed_at:
            raise KeyboardInterrupt
        self.steps.append(step)
        self.used.update(rows.tolist())
        self._loss(rows).backward()

    def evaluate(self, rows: Tensor) -> float:
        return float(self._loss(rows).detach())


def trainer(
    folder: Path | None = None, stored: torch.dtype = torch.float32, **changes
) -> tuple[Trainer, LeastSquares]:
    weight = nn.Parameter(torch.zeros(WIDTH))
    objective = LeastSquares(weight)
    given = {"epochs": 60, "learning_rate": 0.1, "batch_size": 4, "evaluations": 6, "patience": 6}
    settings = Training(**(given | changes))
    return Trainer(
        {"w": weight}, {"w": Storage(FLOAT, stored)}, objective, settings, SEQUENCES, folder
    ), objective


def test_it_finds_the_least_squares_solution() -> None:
    training, objective = trainer()
    seen: list[tuple[int, State]] = []
    state = training.train(lambda step, state: seen.append((step, state)))
    assert state.step == training.steps == 60 * 6  # 2 of 24 are held out: 22 in batches of 4
    assert state.best < 1e-4 * state.before
    torch.testing.assert_close(training.best()["w"], objective.solution, atol=0.02, rtol=0)
    assert [step for step, _ in seen] == [*range(360), 360]
    assert objective.steps == list(range(360))


def test_held_out_sequences_are_not_trained_on() -> None:
    for seed in range(5):
        seen, held = Training(seed=seed, held_out=0.25).split(SEQUENCES)
        assert len(held) == 6
        assert sorted([*seen.tolist(), *held.tolist()]) == list(range(SEQUENCES))
    training, objective = trainer()
    training.train()
    assert objective.used == set(training.seen.tolist())
    with pytest.raises(UserError, match="cannot be both"):
        Training().check_sequences(1)


def test_losses_and_results_are_those_of_the_stored_dtype() -> None:
    training, objective = trainer(stored=torch.bfloat16)
    state = training.train()
    best = training.best()["w"]
    assert best.dtype == torch.bfloat16
    exact = objective.weight.detach().clone()
    assert not torch.equal(exact, exact.bfloat16().float())  # masters are not rounded
    objective.weight.data.copy_(best.float())
    assert objective.evaluate(training.held) == pytest.approx(state.best, rel=1e-5)


@pytest.mark.parametrize("rate", [1e4, 1e38])
def test_it_stops_early_and_keeps_what_was_given(rate: float, tmp_path: Path) -> None:
    training, objective = trainer(tmp_path, learning_rate=rate, patience=2, warmup=0)
    state = training.train()
    assert state.best == state.before
    assert state.worse == 2
    assert objective.steps[-1] < training.steps / 2
    assert not training.best()["w"].any()


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected, _ = trainer(whole)
    state = expected.train()
    for killed_at in (30, 100, 250):  # evaluations are after 60, 120, ... steps
        cut, objective = trainer(parts)
        objective.killed_at = killed_at
        with pytest.raises(KeyboardInterrupt):
            cut.train()
    resumed, objective = trainer(parts)
    assert resumed.train() == state
    assert objective.steps[0] == 240
    for name in ("best.safetensors", "training.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
