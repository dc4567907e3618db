"""What a command needs to meet a latency: the runtime checked, the pieces measured, then the whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from diffprune_plugin.config.latency import LatencyConfig
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.export.convert import IMAGE, check_options
from diffprune_plugin.export.proofs import check_device
from diffprune_plugin.graph.costs import meta_copy
from diffprune_plugin.latency.costs import latency_costs
from diffprune_plugin.latency.structures import Structures
from diffprune_plugin.latency.table import Table
from diffprune_plugin.latency.target import Meeting, Planner
from diffprune_plugin.latency.timing import OPSET, PieceTimer
from diffprune_plugin.latency.whole import Whole, context, whole_files
from diffprune_plugin.planning.allocated import LatencyCosts
from diffprune_plugin.planning.options import BUDGETS, PlanOptions
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.planning.planner import Material
from diffprune_plugin.planning.widths import layer_multiple
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.utils.files import check_place
from diffprune_plugin.utils.optional import need

# What an export calls the keys of ``latency``; a flag stands before those that it begins with.
FLAGS = {
    "--provider-option": "latency: options:",
    "--provider": "latency: provider:",
    "--dtype": "latency: dtype:",
}


def check_runtime(config: LatencyConfig) -> None:
    """Raises BadInput or HardwareUnproved, before anything is measured, for a runtime that is not there."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package)
    try:
        check_options(OPSET, config.dtype)
        check_device(config.spec, config.dtype)
    except BadInput as error:
        told = str(error)
        for flag, key in FLAGS.items():
            told = told.replace(flag, key)
        raise BadInput(told) from None
    if config.table is not None:
        check_place(Path(config.table), "latency: table")
        Table(no_timer, {}, Path(config.table))


def check_size(config: LatencyConfig, model: nn.Module) -> None:
    """Raises BadInput for a size of samples that the model cannot take, before anything is measured."""
    if config.size is None:
        return
    adapter, bare = find_adapter(model), meta_copy(model)
    if not {word for shape in adapter.shapes(model).values() for word in shape}.issuperset(IMAGE):
        raise BadInput(f"latency: size: {config.size}: a {adapter.model_class} takes no height and width; leave it out")
    try:
        with torch.no_grad():
            adapter.denoise(bare, adapter.flat_inputs(bare, size=(config.size, config.size)))
    except (RuntimeError, ValueError) as error:
        told = f"latency: size: {config.size}: the model cannot take it: {first_line(error)}"
        raise BadInput(f"{told}; give another or leave it out") from None


def no_timer(piece: object) -> float:
    raise AssertionError(piece)


def table_of(config: LatencyConfig, file: Path | None, progress: bool, store: bool = True) -> Table:
    """The table of measured pieces: the config's file, else ``file``, which an interrupted run leaves; written only if
    ``store``."""
    place = Path(config.table) if config.table else file
    timer = PieceTimer(config.spec, config.dtype, config.threads)
    return Table(timer, {**context(config), "opset": OPSET}, place, progress, store=store)


@dataclass(frozen=True)
class Timed:
    """One model on one runtime: what its plans take by the sum of pieces, and the whole to be measured."""

    options: PlanOptions
    structures: Structures
    table: Table
    costs: LatencyCosts
    whole: Whole

    def share(self, plan: PruningPlan) -> float:
        """The measured share of the dense model's latency."""
        return self.whole(self.structures.shrunk(plan.groups)).share[0]

    def dense_ms(self) -> float:
        """The dense model's latency in milliseconds."""
        return self.whole(self.structures.bare).dense_ms


@contextlib.contextmanager
def timed_on(
    options: PlanOptions,
    config: LatencyConfig,
    model: nn.Module,
    material: Material,
    file: Path | None,
    progress: bool,
    store: bool = True,
) -> Iterator[Timed]:
    """The pieces measured, the dense model exported: for as long as the whole is to be measured.

    file: of the pieces where the config names none; None: they are not kept. store: whether a file is written.
    """
    asked = options.with_wishes_of(material.criterion)
    if not asked.timed:  # for as many widths as it would have then
        free = {"pruning_ratio": None, **dict.fromkeys(BUDGETS), "latency_target": 0.5}
        asked = asked.model_copy(update=free)
    structures, table = Structures(model, material, config.batch, config.size), table_of(config, file, progress, store)
    costs = latency_costs(structures, asked, table, layer_multiple(config.runtime))
    with whole_files(structures.bare, material.adapter, config) as whole:
        yield Timed(asked, structures, table, costs, whole)


def meet_latency(
    options: PlanOptions,
    config: LatencyConfig,
    model: nn.Module,
    material: Material,
    plan: Planner,
    file: Path | None,
    progress: bool,
    store: bool = True,
) -> PruningPlan:
    """The plan whose measured latency is nearest to what the options ask for; raises what `Meeting.run` raises."""
    with timed_on(options, config, model, material, file, progress, store) as on:
        return Meeting(on.options, on.structures, on.table, on.costs, on.whole, plan).run()
