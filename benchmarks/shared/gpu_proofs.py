"""The proofs of a provider, tried: they hold where nothing is wrong, and each fault that can be planted is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from diffprune_plugin.errors import HardwareUnproved
from diffprune_plugin.export.proofs import (
    Bound,
    binding_proof,
    device_proof,
    profile_proof,
    prove,
    replay_proof,
    session_proof,
)
from diffprune_plugin.export.providers import known_provider

CLEAN = 20  # runs without a fault
Row = dict[str, Any]


def clean(provider: str, path: Path, feeds: Mapping[str, Any], dims: Mapping[str, int]) -> Row:
    """The negative control: the proofs hold each time where nothing is wrong."""
    held = [prove(path, provider, feeds, dims)[0].proved for _ in range(CLEAN)]
    return {"runs": CLEAN, "alarms": held.count(False), "passed": all(held)}


class Stale(Bound):
    """A captured graph with other addresses: it goes on with what it saw first."""

    def put(self, feeds: Any) -> None:
        pass


def faults(provider: str, path: Path, feeds: Mapping[str, Any], dims: Mapping[str, int]) -> Row:
    """Each fault that can be planted, and whether a proof refuses it."""
    wanted, found = known_provider(provider), Row()
    strange = with_strange_node(path, path.with_name("strange.onnx"))
    found["a node without a kernel, left to the CPU"] = refused(lambda: prove(strange, provider, feeds, dims))
    opened = session_proof(strange, provider, dims, 1, path.parent)[1]
    found["the same, and the session says so"] = not opened.held
    found["a provider that is listed and not there"] = not device_proof(replace(wanted, memory="nowhere")).held
    bound, plain = (prove(path, provider, feeds, dims)[1] for _ in range(2))
    found["inputs and outputs in another memory"] = not binding_proof("elsewhere", bound.devices()).held
    bound.__class__ = Stale
    found["a replay that reads old buffers"] = not replay_proof(bound, plain, feeds).held
    args = {"provider": wanted.name, "op_name": "MemcpyToHost"}
    copy = {"cat": "Node", "name": "copy_kernel_time", "args": args}
    found["copies between memories"] = not profile_proof(wanted, [copy]).held
    return found | {"passed": all(found.values())}


def with_strange_node(path: Path, target: Path) -> Path:
    """The model with a node at its end that nobody but the CPU computes."""
    model = onnx.load(path)
    output = model.graph.output[0]
    name, output.name = output.name, "strange"
    model.graph.node.append(onnx.helper.make_node("Det", ["square"], ["determinant"]))
    square = onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "eye")
    model.graph.initializer.append(square)
    model.graph.node.insert(-1, onnx.helper.make_node("ReduceMean", [name], ["mean"], keepdims=0))
    model.graph.node.insert(-1, onnx.helper.make_node("Mul", ["eye", "mean"], ["square"]))
    model.graph.node.append(onnx.helper.make_node("Add", [name, "determinant"], ["strange"]))
    onnx.save(model, target)
    return target


def refused(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except HardwareUnproved:
        return True
    return False
