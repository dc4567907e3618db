"""Passes that begin where a model differs: what they give, against passes that begin at the inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_conditional import SD, SDXL
from tiny_conditional import make_unet as make_conditional
from tiny_transformers import MODELS, make, samples_for
from torch import Tensor, nn
from torch.nn import functional

from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.schedulers import training_scheduler
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.planner import material_of, plan_from
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.sensitivity.measured import near
from diffprune_plugin.sensitivity.prefix import ended_before, recorded, served
from diffprune_plugin.sensitivity.trials import Trials
from diffprune_plugin.testing.tiny import tiny_unet

UNETS = {"UNet": tiny_unet, "sd 1.5": lambda: make_conditional(SD), "sdxl": lambda: make_conditional(SDXL)}


@pytest.mark.parametrize("name", [*UNETS, *MODELS])
def test_a_trial_gives_the_same_as_one_whose_passes_begin_at_the_inputs(name: str) -> None:
    model = UNETS[name]() if name in UNETS else make(name)
    adapter, (samples, scheduler) = find_adapter(model), samples_for(model)
    scheduler = training_scheduler(scheduler)
    trials = Trials.of(model, scheduler, fitting(samples, model, adapter, scheduler), adapter, samples=16, seed=0)
    options = PlanOptions.make({"pruning_ratio": 0.3}, "test")
    material = material_of(options, model, "magnitude")
    plan = plan_from(material, options, None)
    base = trials.base(plan.removed_units(), plan.heads)
    changes = near(plan, material, options, SimpleNamespace(most=0.75, knows=lambda root, count: True))
    assert any(trials.before[change.root] for change in changes)
    for root, units in [(change.root, change.removed) for change in changes]:
        whole = trials.refitted(base.start, {**base.units, root: units}, base.heads, trials.touched(root))
        assert trials.error(base, root, units) == pytest.approx(trials.look.error(whole), rel=1e-5)


class Toy(nn.Module):
    """``first`` is called twice, what ``second`` gives is changed afterwards, ``third`` gives more than tensors, of
    ``inner`` only the weight is used, by ``outer``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = Counted(), Counted(), Counted(named=True), Counted()
        self.outer = Outer()
        self.last = Counted()

    def forward(self, x: Tensor) -> Tensor:
        changed = self.second(self.first(self.first(x)))
        changed += 1
        return self.last(self.outer(self.fourth(self.third(changed)[1])))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner = Counted(), Counted()

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.before(x), self.inner.weight)


class Counted(nn.Linear):
    def __init__(self, named: bool = False) -> None:
        super().__init__(3, 3)
        self.calls, self.named = 0, named

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return ("name", super().forward(x)) if self.named else super().forward(x)


ORDER = {
    name: place
    for place, name in enumerate(["first", "second", "third", "fourth", "outer.before", "outer", "last", ""])
}


@torch.no_grad()
def test_what_is_called_twice_changed_in_place_or_gives_other_than_tensors_runs_again() -> None:
    torch.manual_seed(0)
    toy, x = Toy(), torch.randn(2, 3)
    with recorded(toy, ended_before(ORDER, ["last"])) as outputs:
        expected = toy(x)
    assert sorted(outputs) == ["fourth", "outer"]
    with served(toy, outputs):
        assert torch.equal(toy(x), expected)
    calls = {name: module.calls for name, module in toy.named_modules() if isinstance(module, Counted)}
    assert calls == {"first": 4, "second": 2, "third": 2, "fourth": 1, "outer.before": 1, "outer.inner": 0, "last": 2}
    assert torch.equal(toy(2 * x), Toy.forward(toy, 2 * x))
    assert not torch.equal(toy(2 * x), expected)


def test_a_layer_that_is_not_called_itself_changes_all_that_is_around_it() -> None:
    assert ended_before(ORDER, ["outer.inner"]) == ["first", "second", "third", "fourth"]
    assert ended_before(ORDER, ["outer.inner", "second"]) == ["first"]
    assert ended_before(ORDER, ["last"]) == ["first", "second", "third", "fourth", "outer"]
    assert ended_before(ORDER, ["of the model"]) == []
