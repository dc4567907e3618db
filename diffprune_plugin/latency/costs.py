"""The latency of a plan as a column of its sizes: the sum over pieces, fitted to their measured times.

Of a piece with layers l, which have the channels (in, out) and are applied at so many positions, the time is taken as
a * MACs + b * sum positions * in + c * sum positions * out + d, with a, b, c, d >= 0 for each kind of piece: what is
computed, what is read and written by norms, activations and attention, and what a call costs. In the MACs channels
count by the blocks that the hardware works in: the staircase that measured times show. What stands between the pieces
(concatenations, sums, changes of layout) is what the whole model takes beyond them: f * sum positions * out + g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from diffprune_plugin.graph.costs import LayerCost
from diffprune_plugin.latency.pieces import Piece
from diffprune_plugin.latency.structures import Structures
from diffprune_plugin.latency.table import Table
from diffprune_plugin.planning.allocated import LatencyCosts, choices
from diffprune_plugin.planning.allocation import Column, in_multiples
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import GroupPlan

Numbers = npt.NDArray[np.float64]
PLANS = 12  # random ones that the fit is made from
WHOLE = 3  # of these plans one in so many is timed whole too, as is the dense model
MOST = 0.75  # of a group: what the linear estimate goes to
SPREAD = 0.3  # of the groups of one plan around its own depth, as a share of what a group can lose


def latency_costs(
    structures: Structures, options: PlanOptions, table: Table, multiple: int, plans: int = PLANS
) -> LatencyCosts:
    """The column fitted to the pieces of the dense model and of random plans; measures those that are not in the table.

    multiple: of channels that the hardware works in.
    """
    items, costs = structures.material.items, structures.material.costs
    widths = choices(items, options, MOST)
    planned = [[of[min(of)] for of in widths], *random_plans(widths, plans)]
    found = [structures.pieces(plan) for plan in planned]
    wholes = {place: structures.whole(planned[place]) for place in range(0, len(planned), WHOLE)}
    table.measure([*(piece for pieces in found for piece in pieces), *wholes.values()])
    fits = fitted(found[0], found, table, costs, multiple)
    seen = [(sum(terms(p, costs, multiple)[2] for p in found[place]), 1.0) for place in wholes]
    beyond = [table.times[whole.key] - table.total(found[place]) for place, whole in wholes.items()]
    between = non_negative(np.array(seen), np.maximum(beyond, 0))
    return LatencyCosts(column_of(found[0], fits, between, costs, multiple))


def random_plans(widths: Sequence[Mapping[int, GroupPlan]], count: int, seed: int = 0) -> list[list[GroupPlan]]:
    """Plans of all depths, from everything that may go down to little, each group somewhere around its plan's."""
    generator, plans = np.random.default_rng(seed), []
    for depth in np.linspace(1, 0, count):
        at = np.clip(generator.normal(depth, SPREAD, len(widths)), 0, 1)
        plans.append([of[sorted(of)[round(share * (len(of) - 1))]] for of, share in zip(widths, at, strict=True)])
    return plans


def fitted(
    dense: Sequence[Piece],
    found: Sequence[Sequence[Piece]],
    table: Table,
    costs: Mapping[str, LayerCost],
    multiple: int,
) -> dict[str, Numbers]:
    """(a, b, c, d) by the key that a piece has in the dense model, of least relative errors."""
    rows: dict[str, dict[str, Numbers]] = {}
    for pieces in found:
        for kind, piece in zip(dense, pieces, strict=True):
            rows.setdefault(kind.key, {})[piece.key] = terms(piece, costs, multiple)
    fits = {}
    for kind_key, of in rows.items():
        times = np.maximum([table.times[key] for key in of], 1e-6)
        fits[kind_key] = non_negative(np.stack(list(of.values())) / times[:, None], np.ones(len(times)))
    return fits


def terms(piece: Piece, costs: Mapping[str, LayerCost], multiple: int) -> Numbers:
    """What a, b, c and d are multiplied with, shape (4,)."""
    macs, into, out = 0.0, 0.0, 0.0
    for name, (channels_in, channels_out) in piece.widths.items():
        positions = costs[name].positions
        blocks = in_multiples(np.array([channels_in, channels_out], np.float64), multiple).prod()
        macs += per_pair(costs[name]) * positions * blocks
        into += positions * channels_in
        out += positions * channels_out
    return np.array([macs, into, out, 1.0])


def per_pair(cost: LayerCost) -> float:
    """Weights of a layer for each pair of an input and an output channel."""
    return cost.weights / max(cost.channels_in * cost.channels_out, 1)


def column_of(
    dense: Sequence[Piece],
    fits: Mapping[str, Numbers],
    between: Numbers,
    costs: Mapping[str, LayerCost],
    multiple: int,
) -> Column:
    """The fits of all pieces, and of what is between them, as one column."""
    rows = {name: row for row, name in enumerate(costs)}
    product, into, out, rest = np.zeros(len(costs)), np.zeros(len(costs)), np.zeros(len(costs)), float(between[1])
    for piece in dense:
        a, b, c, d = fits[piece.key]
        for name in piece.widths:
            positions = costs[name].positions
            product[rows[name]] += a * per_pair(costs[name]) * positions
            into[rows[name]] += b * positions
            out[rows[name]] += (c + between[0]) * positions
        rest += float(d)
    return Column(product, into, out, rest, multiple)


def non_negative(matrix: Numbers, wanted: Numbers) -> Numbers:
    """Least squares with coefficients >= 0: the most negative one is left out until none is, shape (columns,)."""
    scale = np.abs(matrix).max(0)
    active = [column for column in range(matrix.shape[1]) if scale[column] > 0]
    while True:
        found = np.zeros(matrix.shape[1])
        found[active] = np.linalg.lstsq(matrix[:, active] / scale[active], wanted, rcond=None)[0]
        if not (found < 0).any():
            return found / np.where(scale > 0, scale, 1)
        active.remove(int(np.argmin(found)))
