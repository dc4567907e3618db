"""A latency that is asked for is met, with clocks that the tests have made: of pieces, and of the whole model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_unet
from tiny_transformers import make
from torch import nn

from diffprune_plugin.config.latency import LatencyConfig
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.export import benchmark
from diffprune_plugin.export.promise import promise_line, promised
from diffprune_plugin.graph.costs import own_parameters
from diffprune_plugin.latency.costs import MOST, latency_costs, non_negative, random_plans
from diffprune_plugin.latency.pieces import Piece, filled, key_of, outermost
from diffprune_plugin.latency.run import check_size
from diffprune_plugin.latency.structures import Structures
from diffprune_plugin.latency.table import Table
from diffprune_plugin.latency.target import Meeting, aimed
from diffprune_plugin.latency.whole import OPENED, Measured, WholeFiles
from diffprune_plugin.planning.allocated import LatencyCosts, choices
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.planning.planner import Material, material_of, plan_from, share_of
from diffprune_plugin.planning.target import sizes
from diffprune_plugin.sensitivity.frontier import frontier
from diffprune_plugin.sensitivity.sensitivity import Sensitivity

FACTS = {
    "provider": "cpu",
    "dtype": "fp32",
    "batch": 1,
    "threads": 1,
    "clock": "thread",
    "device": "made up",
    "versions": {},
}
QUIET = (0.995, 1.005)


BETWEEN = 0.2  # of the channels' part, once more: what the whole model takes beyond its pieces


def cost_of(piece: Piece) -> float:
    """A clock of no noise: a part for products of blocks of 4 channels, parts for channels, one for the call."""
    if not piece.name:
        return sum(map(cost_of, piece.inputs)) + BETWEEN * len(piece.inputs)
    widths = np.array(list(piece.widths.values()), np.float64)
    return float((np.ceil(widths / 4) * 4).prod(1).sum() / 100 + widths.sum() / 10 + 1)


class Evenly:
    """A sensitivity in which each further unit of a group costs more than the last."""

    most, sha256 = MOST, "even"

    def knows(self, root: str, count: int) -> bool:
        return True

    def error(self, root: str, units: Sequence[int]) -> float:
        return float(len(units)) ** 2


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Quick(Structures):
    """Structures whose pieces are single layers, told from the plan alone: nothing is run."""

    def shrunk(self, planned: Any) -> Any:
        return planned

    def pieces(self, planned: Any) -> list[Piece]:
        costs = self.material.costs
        changed = sizes(self.groups, planned, costs)[0]
        widths = {n: changed[n].after if n in changed else (c.channels_in, c.channels_out) for n, c in costs.items()}
        return [Piece(name, nn.Identity(), (), {name: width}, sha(f"{name} {width}")) for name, width in widths.items()]

    def whole(self, planned: Any) -> Piece:
        pieces = self.pieces(planned)
        return Piece("", nn.Identity(), tuple(pieces), {}, sha(" ".join(piece.key for piece in pieces)))


class Wholes:
    """A whole model that takes the sum of its pieces and what is between them, bent."""

    facts: Mapping[str, Any] = FACTS

    def __init__(self, structures: Structures, bend: Callable[[float], float], noise: tuple[float, float]) -> None:
        self.structures, self.bend, self.noise, self.asked = structures, bend, noise, 0

    def __call__(self, planned: Any) -> Measured:
        self.asked += 1
        dense = cost_of(self.structures.whole([]))
        share = self.bend(cost_of(self.structures.whole([] if planned is self.structures.bare else planned)) / dense)
        return Measured((share, share * 0.99, share * 1.01), self.noise, 10.0)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return make_unet(norm_num_groups=4)


@pytest.fixture(scope="module")
def material(unet: nn.Module) -> Material:
    return material_of(PlanOptions.make({"latency_target": 0.5}), unet, "magnitude")


@pytest.fixture(scope="module")
def structures(unet: nn.Module, material: Material) -> Structures:
    return Structures(unet, material, batch=1)


@pytest.fixture(scope="module")
def quick(unet: nn.Module, material: Material) -> Quick:
    return Quick(unet, material, batch=1)


@pytest.fixture(scope="module")
def few(unet: nn.Module) -> Quick:
    """Of the groups a third: the others stay."""
    asked = {"latency_target": 0.5, "target_layers": ["up_blocks.0.*", "down_blocks.1.*", "mid_block.*"]}
    return Quick(unet, material_of(PlanOptions.make(asked), unet, "magnitude"), batch=1)


def options(**values: Any) -> PlanOptions:
    return PlanOptions.make({"latency_target": 0.6, "allocation": "uniform", **values})


@functools.cache
def column_of_pieces(structures: Structures) -> LatencyCosts:
    return latency_costs(structures, options(), Table(cost_of, {}, progress=False), 4)


def meeting(
    structures: Structures,
    asked: PlanOptions,
    *,
    bend: Callable[[float], float] = lambda share: share,
    noise: tuple[float, float] = QUIET,
    timer: Callable[[Piece], float] = cost_of,
) -> Meeting:
    table = Table(timer, {}, progress=False)
    costs = column_of_pieces(structures)

    def plan(changed: PlanOptions, current: LatencyCosts) -> PruningPlan:
        return plan_from(structures.material, changed, None, Evenly(), current)

    return Meeting(asked, structures, table, costs, Wholes(structures, bend, noise), plan)


def test_the_pieces_are_the_whole_model_each_layer_once(unet: nn.Module, structures: Structures) -> None:
    widths = choices(structures.material.items, options(), MOST)
    pieces = structures.pieces([of[min(of)] for of in widths])
    named = [layer for piece in pieces for layer in piece.widths]
    assert sorted(named) == sorted(name for name, layer in unet.named_modules() if own_parameters(layer))
    assert {name for name, _ in outermost(unet)} == {piece.name for piece in pieces}
    assert sum(p.numel() for piece in pieces for p in piece.module.parameters()) == unet.num_parameters()


def test_a_piece_with_random_weights_computes_what_its_place_in_the_model_does(structures: Structures) -> None:
    widths = choices(structures.material.items, options(), MOST)
    for piece in structures.pieces([of[max(of)] for of in widths]):
        call, inputs = filled(piece, torch.float32)
        assert torch.isfinite(call(*inputs)).all()


def test_pieces_of_another_size_or_batch_are_other_pieces(unet: nn.Module, structures: Structures) -> None:
    plan = [of[0] for of in choices(structures.material.items, options(), MOST)]
    kinds = [structures, Structures(unet, structures.material, 1, size=24), Structures(unet, structures.material, 2)]
    keys = [{piece.key for piece in each.pieces(plan)} for each in kinds]
    samples = [each.inputs(each.bare)["sample"].shape for each in kinds]
    assert samples[1][-2:] == (24, 24)
    assert samples[2][0] == 2
    for other in keys[1:]:
        assert len(other & keys[0]) < len(keys[0]) / 2, "only what has no image in it is the same"


def test_pieces_of_the_same_sizes_share_a_key_and_heads_count(structures: Structures) -> None:
    widths = choices(structures.material.items, options(), MOST)
    dense = structures.pieces([of[min(of)] for of in widths])
    again = structures.pieces([of[min(of)] for of in widths])
    assert [piece.key for piece in dense] == [piece.key for piece in again]
    small = structures.pieces([of[max(of)] for of in widths])
    changed = [a.key != b.key for a, b in zip(dense, small, strict=True)]
    assert sum(changed) > len(changed) / 2
    attention = next(piece for piece in dense if type(piece.module).__name__ == "Attention")
    other = structures.pieces([of[min(of)] for of in widths])[dense.index(attention)]
    other.module.heads += 1
    assert key_of(other.module, other.inputs) != attention.key


def test_the_column_predicts_plans_that_it_was_not_fitted_to(quick: Quick) -> None:
    asked, table, costs = options(), Table(cost_of, {}, progress=False), column_of_pieces(quick)
    items = quick.material.items
    size = share_of(items, quick.material.costs, costs)
    plans = random_plans(choices(items, asked, MOST), 4)
    pieces = [quick.pieces(plan) for plan in plans]
    dense = quick.pieces([])
    table.measure(piece for of in (dense, *pieces) for piece in of)
    for plan, of in zip(plans, pieces, strict=True):
        true = (table.total(of) + BETWEEN * len(of)) / (table.total(dense) + BETWEEN * len(dense))
        assert size([len(group.removed) for group in plan]) == pytest.approx(true, rel=0.1)


def test_coefficients_below_zero_are_left_out() -> None:
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert non_negative(matrix, np.array([3.0, 5.0, 7.0])) == pytest.approx([1, 2])
    kept = non_negative(matrix, np.array([3.0, 2.0, 1.0]))
    assert kept == pytest.approx([2, 0])


@pytest.mark.parametrize("share", [0.75, 0.6, 0.45])
def test_a_whole_that_is_not_the_sum_of_its_pieces_is_met_within_three_plans(quick: Quick, share: float) -> None:
    run = meeting(quick, options(latency_target=share), bend=lambda x: 0.1 + 0.9 * x)
    plan = run.run()
    assert plan.latency is not None
    assert plan.latency.measured[0] == pytest.approx(share, rel=0.03)
    assert plan.latency.attempts == run.whole.asked <= 3
    assert plan.target == {"latency_target": share}
    assert plan.shortfalls() == []


def test_the_next_plan_aims_between_what_was_measured_above_and_below() -> None:
    assert aimed([(0.45, 0.39)], 0.45) == pytest.approx(0.45 * 0.45 / 0.39)
    assert aimed([(0.45, 0.39), (0.52, 0.48)], 0.45) == pytest.approx(0.45 + 0.07 * 0.06 / 0.09)
    assert aimed([(0.7, 0.8), (0.6, 0.7)], 0.6) == pytest.approx(0.6 * 0.6 / 0.7), "the nearest, not the first"
    assert aimed([(0.9, 0.5)], 0.6) == 1.0


def test_with_a_sensitivity_the_groups_get_widths_of_their_own(few: Quick) -> None:
    plan = meeting(few, options(allocation="linear"), bend=lambda x: x**0.9).run()
    assert plan.allocation is not None
    assert plan.latency is not None
    assert plan.latency.measured[0] == pytest.approx(0.6, rel=0.03)
    assert len({len(group.removed) / group.units for group in plan.groups}) > 2


def test_milliseconds_are_a_share_of_what_the_dense_model_takes(quick: Quick) -> None:
    asked = options(latency_target=None, max_latency_ms=6.0)
    plan = meeting(quick, asked).run()
    assert plan.target == {"latency_target": 0.6}
    assert plan.latency is not None
    assert plan.latency.max_ms == 6.0
    assert plan.latency.measured[0] * plan.latency.dense_ms == pytest.approx(6.0, rel=0.03)
    with pytest.raises(BadInput, match=r"the dense model takes 10 ms already"):
        meeting(quick, options(latency_target=None, max_latency_ms=11.0)).run()
    with pytest.raises(BadInput, match=r"^max_latency_ms: 0.1: as a share of the dense model's latency, 0.01 "):
        meeting(quick, options(latency_target=None, max_latency_ms=0.1)).run()


def test_both_budgets_hold(few: Quick) -> None:
    run = meeting(few, options(latency_target=0.8, params_target=0.6, allocation="linear"))
    plan = run.without_slower(0.8, first=True)
    assert plan is not None
    assert plan.params[1] <= 0.6 * plan.params[0] * 1.001
    assert run.predicted(plan) <= 0.8 * 1.001


def test_a_target_that_cannot_be_reached_and_a_noisy_machine_are_told(quick: Quick) -> None:
    for allocation in ("linear", "uniform"):
        with pytest.raises(BadInput, match=r"latency_target.* 0\.01.* all that these settings can reach"):
            meeting(quick, options(latency_target=0.01, allocation=allocation)).run()
    with pytest.raises(CheckFailed, match=r"too noisy: the dense model against itself is \[0\.950, 1\.040\]"):
        meeting(quick, options(), noise=(0.95, 1.04)).run()


def test_where_it_is_too_noisy_it_is_measured_once_more_and_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measured(_: Any, pruned: Any, opened: int) -> Measured:
        asked.append(opened)
        return Measured((0.6, 0.5, 0.7), (0.95, 1.04) if opened == OPENED[0] else QUIET, 10.0)

    monkeypatch.setattr(WholeFiles, "written", lambda *_: None)
    monkeypatch.setattr(WholeFiles, "measured", measured)
    whole = object.__new__(WholeFiles)
    assert whole(nn.Identity()).noise == QUIET
    assert asked == [*OPENED]
    monkeypatch.setattr(WholeFiles, "measured", lambda *_: asked.append(0) or Measured((1, 1, 1), QUIET, 10.0))
    whole(nn.Identity())
    assert asked == [*OPENED, 0], "one is enough where it is quiet"


def test_a_whole_that_stays_away_is_told_and_strict_makes_it_an_error(quick: Quick) -> None:
    plan = meeting(quick, options(), bend=lambda x: 0.9).run()
    assert "latency_target: asked 0.6, measured 0.9000" in plan.shortfalls()[0]
    with pytest.raises(CheckFailed, match=r"strict: latency_target: asked 0\.6"):
        meeting(quick, options(strict=True), bend=lambda x: 0.9).run()


def test_no_group_gets_a_width_that_is_slower_than_a_larger_one(few: Quick) -> None:
    def planned(timer: Callable[[Piece], float]) -> PruningPlan:
        plan = meeting(few, options(allocation="linear"), timer=timer).without_slower(0.6, first=True)
        assert plan is not None
        return plan

    group = next(group for group in planned(cost_of).groups if group.root.endswith("conv1") and group.removed)
    root, width = group.root, group.units - len(group.removed)

    def with_cliff(piece: Piece) -> float:
        """As `cost_of`, and a convolution of just that width costs ten times as much."""
        return cost_of(piece) * (10 if piece.widths.get(root, (0, 0))[1] == width else 1)

    changed = next(group for group in planned(with_cliff).groups if group.root == root)
    assert changed.units - len(changed.removed) != width


def test_by_latency_each_point_has_its_own_and_a_third_way_spends_it(few: Quick) -> None:
    costs = column_of_pieces(few)
    material = few.material
    even = Sensitivity(
        {item.group.root: (1.0,) * item.group.units for item in material.items}, 1.0, 1, 1, 0, "", "", {}
    )
    found = frontier(material, options(), even, (0.9, 0.8), costs)
    assert found.target == "macs_target"
    assert {point.allocation for point in found.points} == {"uniform", "linear", "latency"}
    for point in found.points:
        assert point.latency is not None
        assert 0 < point.latency < 1
        if point.allocation == "latency":
            assert point.latency <= point.asked * 1.001
    found = dataclasses.replace(found, dense_ms=10.0)
    assert "dense: 10 ms" in str(found.timed_table().title)
    assert found.timed_table().row_count == len(found.points)
    assert found.across(found.points[0]) == pytest.approx(10 * found.points[0].latency)


def test_the_table_goes_on_where_it_was_and_keeps_other_machines(quick: Quick, tmp_path: Path) -> None:
    widths = choices(quick.material.items, options(), MOST)
    pieces = quick.pieces([of[min(of)] for of in widths])
    timed: list[str] = []

    def dies(piece: Piece) -> float:
        if len(timed) == 5:
            raise KeyboardInterrupt
        timed.append(piece.key)
        return cost_of(piece)

    file = tmp_path / "table.json"
    Table(cost_of, {"device": "another"}, file, progress=False).measure(pieces[:2])
    with pytest.raises(KeyboardInterrupt):
        Table(dies, {"device": "this"}, file, progress=False).measure(pieces)
    left: list[str] = []
    whole = Table(lambda piece: left.append(piece.key) or cost_of(piece), {"device": "this"}, file, progress=False)
    whole.measure(pieces)
    assert not set(left) & set(timed)
    assert set(left) | set(timed) == {piece.key for piece in pieces}
    assert whole.total(pieces) == pytest.approx(sum(map(cost_of, pieces)))
    assert len(json.loads(file.read_text())) == 2


def test_a_dry_run_reads_a_table_and_writes_none(quick: Quick, tmp_path: Path) -> None:
    pieces = quick.pieces([of[min(of)] for of in choices(quick.material.items, options(), MOST)])[:2]
    dry = Table(cost_of, {}, tmp_path / "folder" / "table.json", progress=False, store=False)
    dry.measure(pieces)
    assert dry.total(pieces)
    assert not list(tmp_path.iterdir())


def test_two_runs_that_share_a_table_keep_what_the_other_measures(quick: Quick, tmp_path: Path) -> None:
    first, second = quick.pieces([of[min(of)] for of in choices(quick.material.items, options(), MOST)])[:2]
    file = tmp_path / "table.json"
    same, other, again = (Table(cost_of, {"device": name}, file, progress=False) for name in ("a", "b", "a"))
    for table, piece in ((same, first), (other, first), (again, second)):
        table.measure([piece])
    left = Table(cost_of, {"device": "a"}, file, progress=False)
    assert set(left.times) == {first.key, second.key}
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize("content", ["", "1" * 401, "[]", '{"a": 1}', '{"a": {"context": {}, "pieces": {"b": 1}}}'])
def test_a_damaged_table_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(content)
    with pytest.raises(BadInput, match=r"not a latency table, or damaged|not valid json.*; remove it"):
        Table(cost_of, {}, file)


def test_a_plan_keeps_what_was_measured(quick: Quick, tmp_path: Path) -> None:
    plan = meeting(quick, options()).run()
    plan.write(tmp_path / "plan.json")
    assert PruningPlan.read(tmp_path / "plan.json") == plan
    assert plan.latency is not None
    other = plan.model_copy(update={"latency": plan.latency.model_copy(update={"measured": (0.1, 0.1, 0.1)})})
    assert other.sha256 != plan.sha256


def test_an_export_says_whether_the_latency_holds_here(quick: Quick) -> None:
    plan = meeting(quick, options()).run()
    here = benchmark.Latency("cpu", "fp32", 1, 30)
    for share, holds in ((0.6, True), (0.61, None), (0.7, False)):
        here.ratios = [benchmark.Ratio("dense / pruned", 1, 1 / share, 1 / (share * 1.02), 1 / (share * 0.98))]
        assert promised(plan, here)["holds"] is holds
    assert promise_line(promised(plan, here)).startswith(
        "made for a latency of 60.0% on cpu (fp32): does NOT hold: 70.0%"
    )
    here.fused = True
    assert promised(plan, here)["why"] == "measured with fused operators"
    fused = plan.model_copy(update={"latency": plan.latency.model_copy(update={"fuse": True})})
    assert promised(fused, here)["holds"] is False
    assert fused.sha256 != plan.sha256
    here.fused = False
    assert promised(fused, here)["why"] == "measured with no fused operators (--fuse)"
    here.provider = "cuda"
    assert "provider cuda, not cpu" in promised(plan, here)["why"]
    sized = plan.model_copy(update={"latency": plan.latency.model_copy(update={"size": 24})})
    assert "the config's size, not 24" in promised(sized, here)["why"]
    assert promised(plan, None)["why"] == "no latency was measured"
    assert promised(plan.model_copy(update={"latency": None}), here) == {}


def test_a_command_without_the_provider_writes_nothing(run: Any, config_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = ["--set", "latency_target=0.6", "--set", "importance=magnitude", "--set"]
    code, _, err = run("prune", config_file, *words, "latency.provider=cuda")
    assert code == 3
    assert "cuda is not proved" in err
    code, _, err = run("prune", config_file, *words, "latency.provider=cuad")
    assert code == 2
    assert "did you mean 'cuda'" in err
    code, _, err = run("prune", config_file, *words, "latency={batch: 0}")
    assert code == 2
    assert "latency: batch: 0 is outside" in err
    code, _, err = run("prune", config_file, *words, "latency={options: {prefer_nhwc: 1}}")
    assert code == 2
    assert "prefer_nhwc=1: CPUExecutionProvider: it takes none" in err
    code, _, err = run("prune", config_file, *words, "latency={size: 7}")
    assert code == 2
    assert "latency: size: 7: the model cannot take it" in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_real_runtime_is_measured(run: Any, config_file: Path, tmp_path: Path) -> None:
    words = ["--set", "latency_target=0.8", "--set", f"latency.table={tmp_path / 't.json'}", "--set", "latency.size=24"]
    code, out, err = run("prune", config_file, *words, "--set", "importance=magnitude", "--set", "compensate=false")
    if code == 1:  # a busy machine
        assert "too noisy" in err
        return
    assert code == 0, err
    plan = PruningPlan.read(next((tmp_path / "pruned").rglob("pruning_plan.json")))
    assert plan.latency is not None
    assert plan.latency.size == 24
    assert 0.3 < plan.latency.measured[0] < 1
    assert bool(plan.shortfalls()) == (abs(plan.latency.measured[0] - 0.8) > 0.03 * 0.8)
    assert "latency" in out


@pytest.mark.parametrize(
    ("latency", "words"),
    [
        ("{provider: cuad}", "latency: provider: 'cuad'; did you mean 'cuda'"),
        ("{dtype: fp16}", "latency: provider: cpu computes fp16 models in fp32"),
        ("{options: {prefer_nhwc: 1}}", "latency: options: prefer_nhwc"),
        ("{table: OUTPUT/pieces.json}", "pruned/pieces.json lie inside each other; choose another output"),
        ("{table: OUTPUT.txt/pieces.json}", "choose another latency: table"),
    ],
)
def test_what_is_wrong_with_a_runtime_is_told_by_the_keys_of_the_config(
    run: Any, config_file: Path, tmp_path: Path, latency: str, words: str
) -> None:
    (tmp_path / "pruned.txt").touch()
    given = latency.replace("OUTPUT", str(tmp_path / "pruned"))
    code, _, err = run("prune", config_file, "--set", "latency_target=0.6", "--set", f"latency={given}")
    assert code == 2
    assert words in err
    assert "--" not in err


def test_a_size_of_samples_without_height_and_width_is_refused_before_anything_is_timed() -> None:
    with pytest.raises(BadInput, match=r"latency: size: 64: a FluxTransformer2DModel takes no height and width"):
        check_size(LatencyConfig(size=64), make("Flux"))
