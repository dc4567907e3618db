"""The regressions: the closed form, and on the embedded model what the plain way in float64 finds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.recovery import equations, ridge
from diffprune_plugin.recovery.compensate import compensate_
from diffprune_plugin.recovery.equations import HeldOut, NormalEquations, Training, best_update, training

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def fitted(features: Tensor, residuals: Tensor, bias: bool = True) -> Training:
    made = training(*features.shape, residuals.shape[1], bias, features)
    for some in torch.split(torch.arange(len(features)), 7):
        made.add(features[some], residuals[some])
    made.close()
    return made


def rows(count: int, unknowns: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Features with means far from 0, as activations have them, and residuals that they explain in part."""
    torch.manual_seed(0)
    features = torch.randn(count, unknowns, dtype=torch.float64) + 5 * torch.rand(unknowns)
    return features, features @ torch.randn(unknowns, outputs).double() + torch.randn(count, outputs)


def closed_form(features: Tensor, residuals: Tensor, strength: float, bias: bool) -> Tensor:
    """The augmented least-squares problem: a row a weight that pulls it to 0, none for the bias."""
    unknowns = features.shape[1]
    pull = (strength * features.square().sum() / unknowns).sqrt() * torch.eye(unknowns, dtype=torch.float64)
    x = F.pad(torch.cat([features, pull]), (0, int(bias)), value=1.0)
    x[len(features) :, unknowns:] = 0
    return torch.linalg.lstsq(x, F.pad(residuals, (0, 0, 0, unknowns)), driver="gelsd").solution


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("count", "unknowns"), [(40, 6), (1500, 600), (6, 40)], ids=["few", "blocks", "rows"])
@pytest.mark.parametrize("strength", [1e-4, 0.5])
def test_it_is_the_closed_form(count: int, unknowns: int, strength: float, bias: bool) -> None:
    features, residuals = rows(count, unknowns, 3)
    expected = closed_form(features, residuals, strength, bias)
    for dtype, close in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        update = fitted(features.to(dtype), residuals.to(dtype), bias).solve(strength)
        assert update is not None
        assert relative(update, expected) < close


def test_without_ridge_it_is_least_squares() -> None:
    features, residuals = rows(40, 6, 3)
    expected = torch.linalg.lstsq(F.pad(features, (0, 1), value=1.0), residuals).solution
    torch.testing.assert_close(fitted(features, residuals).solve(1e-14), expected)


def test_a_singular_system_without_ridge_has_no_solution() -> None:
    features, residuals = rows(40, 6, 3)
    features[:, 1] = features[:, 0]
    assert fitted(features, residuals).solve(-1e-9) is None


def held_out(features: Tensor, residuals: Tensor) -> HeldOut:
    made = HeldOut(features.dtype)
    for some in torch.split(torch.arange(len(features)), 7):
        made.add(features[some], residuals[some])
    return made


@pytest.mark.parametrize("bias", [True, False])
def test_the_held_out_error_is_that_of_the_rows(bias: bool) -> None:
    features, residuals = rows(30, 5, 4)
    update = torch.randn(5 + bias, 4, dtype=torch.float64)
    direct = residuals - F.pad(features, (0, int(bias)), value=1.0) @ update
    assert held_out(features, residuals).error(update) == pytest.approx(float(direct.square().sum()))
    assert held_out(features, residuals).error() == pytest.approx(float(residuals.square().sum()))


def test_nothing_is_refitted_to_targets_that_the_inputs_do_not_explain() -> None:
    torch.manual_seed(0)
    seen = fitted(torch.randn(30, 20), torch.randn(30, 4))
    unseen = held_out(torch.randn(30, 20), torch.randn(30, 4))
    assert best_update(seen, unseen, (1e-4, 1e-2)) == (None, 0.0, unseen.error())


class Valley:
    """Held-out errors by strength, and which were asked for; infinite ones have no solution."""

    def __init__(self, *errors: float) -> None:
        self.errors, self.asked = dict(enumerate(errors)), []

    def solve(self, strength: float) -> Tensor | None:
        self.asked.append(strength)
        return torch.tensor(strength) if np.isfinite(self.errors[int(strength)]) else None

    def error(self, update: Tensor | None = None) -> float:
        return 100.0 if update is None else self.errors[int(update)]


INF = float("inf")


@pytest.mark.parametrize(
    ("errors", "best", "asked"),
    [
        ((5, 4, 3, 4, 5), 2, [2, 1, 3]),
        ((1, 2, 3, 4, 5), 0, [2, 1, 0]),
        ((5, 4, 3, 2, 1), 4, [2, 1, 3, 4]),
        ((INF, INF, INF, 2, 3), 3, [2, 1, 3, 4]),
        ((INF, 2, 3, 4, 5), 1, [2, 1, 0]),
        ((7,), 0, [0]),
    ],
)
def test_the_best_strength_is_found_without_trying_all(errors: Any, best: int, asked: list[int]) -> None:
    valley: Any = Valley(*errors)
    update, strength, error = best_update(valley, valley, range(len(errors))[::-1])
    assert (update, strength, error, valley.asked) == (torch.tensor(best), best, errors[best], asked)


# against the plain way


class Both:
    """Takes in rows for two."""

    def __init__(self, fast: Any, plain: Any) -> None:
        self.fast, self.plain = fast, plain

    def add(self, features: Tensor, residuals: Tensor) -> None:
        self.fast.add(features, residuals)
        self.plain.add(features, residuals)

    def close(self) -> None:
        self.fast.close()

    def error(self) -> float:
        return float(self.fast.error())


def compared(monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """The held-out error of the embedded model's compensation, as a sum of shares, and that of the plain way, which
    gets the same rows for each regression.
    """
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from shared.plain_ridge import PlainHeldOut, plain_best_update, plain_training

    found: list[tuple[float, float]] = []
    fast_training, fast_best, fast_held_out = ridge.training, ridge.best_update, ridge.HeldOut

    def best(training: Both, held_out: Both, strengths: Any, written: Any) -> Any:
        result = fast_best(training.fast, held_out.fast, strengths, written)
        plain = plain_best_update(training.plain, held_out.plain, strengths, written)
        start = held_out.plain.error()
        found.append((held_out.plain.error(result[0]) / start, plain[2] / start))
        assert result[2] / start == pytest.approx(found[-1][0], rel=1e-3)
        return result

    monkeypatch.setattr(ridge, "training", lambda *sizes: Both(fast_training(*sizes), plain_training(*sizes)))
    monkeypatch.setattr(ridge, "HeldOut", lambda dtype: Both(fast_held_out(dtype), PlainHeldOut(dtype)))
    monkeypatch.setattr(ridge, "best_update", best)
    monkeypatch.setattr(ridge, "ROWS", 4096)
    monkeypatch.setattr(ridge, "CHUNK", 2**18)
    pipeline = load_pipeline(demo.MODEL)
    model = copy.deepcopy(pipeline.unet)
    plan = dp.make_plan(model, "magnitude", pruning_ratio=0.5)
    dp.remove_(model, plan)
    options: Any = {"samples": 32, "progress": False}
    compensate_(model, pipeline.unet, plan, pipeline.scheduler, demo.CALIBRATION_IMAGES, **options)
    first, second = map(sum, zip(*found, strict=True))
    assert len(found) > 50
    return first, second


@pytest.mark.slow
def test_on_the_embedded_model_the_held_out_error_is_that_of_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    found, plain = compared(monkeypatch)
    assert found == pytest.approx(plain, rel=0.01)


def last_piece_alone(self: NormalEquations, features: Tensor, residuals: Tensor) -> None:
    """The fault of a sum that is set, not added to."""
    for sums in (self.gram, self.cross, self.sums, self.wanted):
        sums.zero_()
    self.rows = 0
    ADD(self, features, residuals)


ADD = NormalEquations.add


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["last piece alone", "one strength"])
def test_the_comparison_sees_a_regression_that_is_worse(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "one strength":
        monkeypatch.setattr(ridge, "best_update", lambda a, b, strengths, w: best_update(a, b, strengths[-1:], w))
    else:
        monkeypatch.setattr(equations.NormalEquations, "add", last_piece_alone)
    found, plain = compared(monkeypatch)
    assert found > 1.01 * plain
