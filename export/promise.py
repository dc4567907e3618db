"""Whether a latency that a plan was made for holds on the machine at hand."""

from __future__ import annotations

from typing import Any

from diffprune_plugin.export.benchmark import PRUNED, Latency
from diffprune_plugin.planning.plan import TIMED_WITHIN, PruningPlan


def promised(plan: PruningPlan | None, found: Latency | None) -> dict[str, Any]:
    """What the plan was made for, and ``holds``: whether it does here, None where that cannot be told, with ``why``.

    A share holds up to 3 % more, where the whole interval says so. Empty for a plan without a latency.
    """
    if plan is None or plan.latency is None:
        return {}
    made, asked = plan.latency, plan.target["latency_target"]
    runtime = {key: getattr(made, key) for key in ("provider", "dtype", "batch", "size", "threads", "fuse")}
    told = {"latency_target": asked, "max_ms": made.max_ms, "made_for": {**runtime, "device": made.device}}
    return {**told, "measured_then": list(made.measured), **judged(plan, found)}


def judged(plan: PruningPlan, found: Latency | None) -> dict[str, Any]:
    made = plan.latency
    if made is None or found is None:
        return {"holds": None, "why": "no latency was measured"}
    here = {"provider": found.provider, "dtype": found.dtype, "threads": found.threads}
    other = [f"{key} {value}, not {getattr(made, key)}" for key, value in here.items() if value != getattr(made, key)]
    if found.fused != made.fuse:
        other.append("fused operators" if found.fused else "no fused operators (--fuse)")
    if made.size is not None:
        other.append(f"the config's size, not {made.size}")
    ratio = next((r for r in found.ratios if r.name == "dense / pruned" and r.batch == made.batch), None)
    if other or ratio is None:
        return {"holds": None, "why": f"measured with {', '.join(other) or f'no batch {made.batch}'}"}
    most, share = plan.target["latency_target"] * (1 + TIMED_WITHIN), (1 / ratio.median, 1 / ratio.high, 1 / ratio.low)
    if made.max_ms is not None:
        took = next(r.p50 for r in found.rows if r.model == PRUNED and r.batch == made.batch)
        why = f"{took:.3g} ms here, asked {made.max_ms:.3g}"
        return {"holds": took <= made.max_ms * (1 + TIMED_WITHIN), "why": why}
    holds = True if share[2] <= most else False if share[1] > most else None
    return {"holds": holds, "why": f"{share[0]:.1%} [{share[1]:.1%}, {share[2]:.1%}] of the dense model's latency here"}


def promise_line(told: dict[str, Any]) -> str:
    """In one line."""
    words = {True: "holds", False: "does NOT hold", None: "cannot be told"}[told["holds"]]
    asked = f"{told['latency_target']:.1%}" if told["max_ms"] is None else f"{told['max_ms']:g} ms"
    made = told["made_for"]
    return f"made for a latency of {asked} on {made['provider']} ({made['dtype']}): {words}: {told['why']}"
