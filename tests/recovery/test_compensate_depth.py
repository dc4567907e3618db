"""Blocks that went, taken over by the layers around the gap: exactly where these can, never worse on held-out ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_conditional import four_stages
from tiny_transformers import make
from torch import Tensor, nn

from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.depth import Cut, cut_out
from diffprune_plugin.recovery import ridge
from diffprune_plugin.recovery.compensate import CompensationReport, compensate_depth_
from diffprune_plugin.recovery.residual import GATED, residual_sum, trace

COUNT = 32


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "ROWS", 2048)


def inputs(model: Any, count: int = 8, seed: int = 5) -> dict[str, Tensor]:
    return find_adapter(model).flat_inputs(model, batch=count, seed=seed, words={"sequence": 5})


def refit(cut: Cut, model: Any, **options: Any) -> CompensationReport:
    """On noise with all that the model takes beside it."""
    adapter = find_adapter(model)
    given = inputs(cut.model, COUNT, 0)
    values = torch.randn(COUNT, *adapter.sample_shape(model), generator=torch.Generator().manual_seed(0))
    samples = Samples(values, extra={port.name: given[port.name] for port in adapter.further_ports(model)})
    flow = adapter.objective == "flow_matching"
    scheduler: Any = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler()
    options = {"samples": 64, "batch_size": 16, "progress": False, **options}
    return compensate_depth_(model, cut.dense, cut.shallower, scheduler, samples, **options)


@torch.no_grad()
def error(model: Any, dense: Any) -> float:
    """Relative, on inputs that nothing was fitted to."""
    outputs = [find_adapter(dense).denoise(each, inputs(dense)) for each in (model, dense)]
    return float((outputs[0] - outputs[1]).norm() / outputs[1].norm())


def dit_with_a_linear_branch(other: float = 0.0) -> Any:
    """A DiT whose third block adds, gate for gate, a matrix times what the second one's feed-forward has inside: its
    branch is linear in what the layer before it sees. ``other``: so much of something that is not."""
    model = make("DiT", num_layers=4)
    before, block = model.transformer_blocks[1], model.transformer_blocks[2]
    mixing, seen = nn.Linear(128, 32), {}

    class Noting(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            seen["hidden"] = hidden
            return super().forward(hidden)

    class Gate(type(before.norm1)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            seen["gate"] = output[4]
            return output

    class Branch(type(block)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            branch = seen["gate"].unsqueeze(1) * mixing(seen["hidden"]) + other * hidden_states.square()
            return hidden_states + branch

    before.ff.net[2].__class__, before.norm1.__class__, block.__class__ = Noting, Gate, Branch
    return model.requires_grad_(False)


@pytest.mark.parametrize(("passes", "closed"), [("one", 1e-9), ("layer", 1e-9), ("one", ridge.CLOSED)])
def test_a_branch_that_is_linear_in_what_the_layer_before_sees_is_taken_over(
    passes: Any, closed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the gate, which differs from sample to sample and channel to channel: exactly, or to what keeps nearly
    closed gates from asking for much."""
    monkeypatch.setattr(ridge, "CLOSED", closed)
    dense = dit_with_a_linear_branch()
    cut = cut_out(dense, ["transformer_blocks.2"])
    model = copy.deepcopy(cut.model)
    damaged = error(model, dense)
    report = refit(cut, model, strengths=(1e-9,), passes=passes)
    first = report.repairs[0]
    assert (first.layers, first.block) == (("transformer_blocks.1.ff.net.2",), "transformer_blocks.1")
    assert damaged > 0.02
    exact = closed == 1e-9
    assert first.after < (1e-6 if exact else 0.02) * first.before
    assert error(model, dense) < (1e-3 if exact else 0.2) * damaged


def test_one_that_is_not_linear_leaves_an_error() -> None:
    dense = dit_with_a_linear_branch(other=0.3)
    cut = cut_out(dense, ["transformer_blocks.2"])
    model = copy.deepcopy(cut.model)
    refit(cut, model, strengths=(1e-9,))
    assert error(model, dense) > 0.01


@pytest.mark.parametrize(
    ("name", "gone", "changes"),
    [
        ("DiT", ["transformer_blocks.1", "transformer_blocks.2"], {"num_layers": 5}),
        ("PixArt sigma", ["transformer_blocks.1"], {"num_layers": 3}),
        ("SD 3", ["transformer_blocks.2"], {}),
        ("SD 3.5", ["transformer_blocks.0"], {}),
        ("Flux", ["transformer_blocks.1", "single_transformer_blocks.0"], {}),
    ],
)
def test_no_repair_is_worse_on_held_out_images_and_the_output_comes_nearer(
    name: str, gone: list[str], changes: dict[str, Any]
) -> None:
    dense = make(name, **changes)
    weights = copy.deepcopy(dense.state_dict())
    cut = cut_out(dense, gone)
    model = copy.deepcopy(cut.model)
    before = error(model, dense)
    report = refit(cut, model)
    assert report.repairs
    assert all(repair.after <= repair.before for repair in report.repairs)
    assert error(model, dense) < 0.9 * before
    assert all(torch.equal(weights[key], value) for key, value in dense.state_dict().items())


@pytest.mark.slow
def test_a_unet_by_a_published_plan_comes_nearer_too() -> None:
    dense = four_stages()
    cut = cut_out(dense, "bk-sdm-tiny")
    model = copy.deepcopy(cut.model)
    before = error(model, dense)
    assert refit(cut, model, samples=32).left == {}
    assert error(model, dense) < 0.7 * before


def test_only_layers_that_get_another_input_and_the_writer_before_the_gap_are_refitted() -> None:
    dense = make("DiT", num_layers=4)
    cut = cut_out(dense, ["transformer_blocks.2"])
    report = refit(cut, copy.deepcopy(cut.model))
    layers = {name for repair in report.repairs for name in repair.layers}
    assert {name for name in layers if ".1." in name} <= {"transformer_blocks.1.ff.net.2"}
    assert not any(name.startswith("transformer_blocks.0") or "norm1" in name for name in layers)
    assert {"transformer_blocks.2.attn1.to_q", "transformer_blocks.2.ff.net.2", "proj_out_2"} <= layers


@torch.no_grad()
def test_what_goes_through_a_gate_is_told_from_what_is_added_and_from_what_is_neither() -> None:
    model = make("DiT")
    calls, _ = trace(model, find_adapter(model))
    block = "transformer_blocks.1"
    assert residual_sum(model, calls, f"{block}.ff.net.2", gates=True) == (block, GATED)
    assert residual_sum(model, calls, f"{block}.ff.net.2") == (f"{block}.ff.net.2", 1.0)
    assert residual_sum(model, calls, f"{block}.attn1.to_out.0", gates=True)[0] != block, (
        "behind it is the feed-forward's norm"
    )
    assert residual_sum(model, calls, "pos_embed.proj") == ("pos_embed", 1.0)
    gates = model.transformer_blocks[1].norm1.linear
    gates.weight[-32:], gates.bias[-32:] = 0.0, 1.0
    calls, _ = trace(model, find_adapter(model))
    assert residual_sum(model, calls, f"{block}.ff.net.2") == (block, 1.0)


def test_what_an_interrupted_call_has_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make("DiT", num_layers=3)
    cut = cut_out(dense, ["transformer_blocks.1"])
    whole, again = copy.deepcopy(cut.model), copy.deepcopy(cut.model)
    refit(cut, whole)
    solve, calls = ridge.System.solve, []

    def interrupted(self: Any, *args: Any) -> Any:
        calls.append(self.block)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(self, *args)

    monkeypatch.setattr(ridge.System, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refit(cut, copy.deepcopy(cut.model), checkpoint=tmp_path)
    refit(cut, again, checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_samples_of_another_size_are_refused() -> None:
    cut = cut_out(make("DiT", num_layers=3), ["transformer_blocks.1"])
    given = copy.deepcopy(cut.model), cut.dense, cut.shallower, DDIMScheduler(), Samples(torch.zeros(2, 4, 6, 6))
    with pytest.raises(BadInput, match="data: samples are"):
        compensate_depth_(*given)
