"""Proof that a model runs on a provider, whole: five independent ones, each enough to refuse a figure."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffprune_plugin.errors import HardwareUnproved, first_line
from diffprune_plugin.export.provider_table import PROVIDERS, Provider
from diffprune_plugin.export.providers import (
    built_in,
    check_distribution,
    check_dtype,
    gpu,
    known_provider,
    open_session,
    opened_with,
    prepare,
    versions,
    without_replay,
)
from diffprune_plugin.utils.optional import need
from diffprune_plugin.utils.out_of_memory import out_of_memory

COPIES = ("MemcpyFromHost", "MemcpyToHost")


@dataclass(frozen=True)
class Proof:
    """One of the five proofs: whether it held, and what was seen."""

    name: str
    held: bool
    seen: str


@dataclass
class Placement:
    """The proofs for one model on one provider, and what they were taken from.

    ``operators``: those of ONNX Runtime's own that ran, fused ones among them, as the session's profile has them.
    ``build_seconds``: until the first run was done, engines and searches for kernels among them; no run that is timed.
    """

    provider: str
    proofs: list[Proof] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    device: str = ""
    operators: dict[str, int] = field(default_factory=dict)
    build_seconds: float = 0.0
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def proved(self) -> bool:
        return len(self.proofs) == 5 and all(proof.held for proof in self.proofs)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"proved": self.proved}


class Bound:
    """A session with its inputs and outputs bound to one memory: the same code path on CPU and GPU."""

    def __init__(self, session: Any, feeds: Mapping[str, Any], memory: str) -> None:
        ort = need("onnxruntime")
        self.session, self.binding = session, session.io_binding()
        place = ort.OrtValue.ortvalue_from_numpy
        self.inputs = {name: place(np.ascontiguousarray(value), memory, 0) for name, value in feeds.items()}
        for name, value in self.inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            self.binding.bind_output(output.name, memory, 0)
        self.run()
        # Bound again to the buffers of the first run, so that no later run allocates.
        self.outputs = dict(zip((o.name for o in session.get_outputs()), self.binding.get_outputs(), strict=True))
        for name, value in self.outputs.items():
            self.binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()

    def put(self, feeds: Mapping[str, Any]) -> None:
        """Other values into the buffers that are bound, of the same shapes and types."""
        for name, value in feeds.items():
            self.inputs[name].update_inplace(np.ascontiguousarray(value))

    def answer(self) -> list[Any]:
        """What a run leaves in the bound outputs."""
        self.run()
        return [value.numpy() for value in self.outputs.values()]

    def devices(self) -> set[str]:
        return {value.device_name() for value in (*self.inputs.values(), *self.outputs.values())}


def prove(
    path: str | Path, provider: str, feeds: Mapping[str, Any], free_dims: Mapping[str, int], threads: int = 1
) -> tuple[Placement, Bound]:
    """Proof that a model runs on a provider, whole, and the session that proved it, to be timed.

    Five independent proofs, each enough to refuse a figure.

    Raises HardwareUnproved that says which failed and what to install; BadInput for more than one distribution.
    """
    wanted = known_provider(provider)
    distribution = check_distribution()
    placement = Placement(provider, versions=versions(distribution), options=opened_with(wanted, threads, Path(path)))

    def held(proof: Proof) -> None:
        placement.proofs.append(proof)
        if not proof.held:
            raise HardwareUnproved(f"{provider} is not proved: {proof.name}: {proof.seen}; to run it: {wanted.install}")

    held(device_proof(wanted))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        session, proof = session_proof(Path(path), provider, free_dims, threads, Path(folder))
        held(proof)
        held(assignment_proof(wanted, assigned_nodes(session)))
        try:
            bound = Bound(session, feeds, wanted.memory)
            placement.build_seconds = time.perf_counter() - start
            bound.run()
        except Exception as error:
            if not wanted.is_gpu and out_of_memory(error):
                raise
            held(Proof("profile", False, f"it opens and does not run: {first_line(error)}"))
            raise
        events = json.loads(Path(session.end_profiling()).read_text())
        placement.operators = own_operators(events)
        held(profile_proof(wanted, events))
        held(binding_proof(wanted.memory, bound.devices()))
        if wanted.replays:
            plain = open_session(path, without_replay(provider), free_dims=free_dims, threads=threads)
            if not (proof := replay_proof(bound, Bound(plain, feeds, wanted.memory), feeds)).held:
                held(proof)
    placement.device = gpu() if wanted.is_gpu else ""
    return placement, bound


def check_device(provider: str, dtype: str) -> None:
    """Raises, before anything is exported, BadInput or HardwareUnproved for a provider that cannot run here."""
    wanted = known_provider(provider)
    check_dtype(provider, dtype)
    check_distribution()
    proof = device_proof(wanted)
    if not proof.held:
        raise HardwareUnproved(f"{provider} is not proved: device: {proof.seen}; to run it: {wanted.install}")


def device_proof(wanted: Provider) -> Proof:
    """Whether a tensor can be put into the provider's memory; the list of providers only tells how it was built."""
    ort = need("onnxruntime")
    if not built_in(wanted):
        return Proof(
            "device", False, f"this onnxruntime was built with {', '.join(ort.get_available_providers())} only"
        )
    prepare(wanted)
    try:
        device = ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), wanted.memory, 0).device_name()
    except Exception as error:
        return Proof("device", False, f"no tensor can be put there: {' '.join(str(error).split())[:200]}")
    return Proof("device", device == wanted.memory, f"a tensor was put on {device}")


def session_proof(
    path: Path, provider: str, free_dims: Mapping[str, int], threads: int, folder: Path
) -> tuple[Any, Proof]:
    """A session that leaves no node to the CPU; where it does not open, what a lenient one would leave there."""
    try:
        session = open_session(
            path, provider, free_dims=free_dims, threads=threads, all_nodes=True, profile=folder / "profile"
        )
    except HardwareUnproved as strict:
        try:
            nodes = assigned_nodes(open_session(path, provider, free_dims=free_dims))
            seen = assignment_proof(known_provider(provider), nodes).seen
        except HardwareUnproved as lenient:
            seen = str(lenient)
        return None, Proof("session", False, f"{seen}; {strict}")
    return session, Proof("session", True, f"opened as {', '.join(session.get_providers())}, none left to the CPU")


def assigned_nodes(session: Any) -> list[tuple[str, str]]:
    """(provider, operator) of each node, as the session assigned it."""
    return [
        (part.ep_name, f"{node.op_type} {node.name}")
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def assignment_proof(wanted: Provider, nodes: Sequence[tuple[str, str]]) -> Proof:
    """Whether every node was assigned to the provider."""
    return whole(wanted, nodes, "assignment", "assigned to")


def kernels_of(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events of a profile in which a kernel ran."""
    return [e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith("_kernel_time")]


def own_operators(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many nodes of a profile have an operator that ONNX does not define, by operator."""
    ran = {str(event["name"]): str(event["args"].get("op_name")) for event in kernels_of(events)}
    return dict(Counter(operator for operator in ran.values() if not need("onnx").defs.has(operator)).most_common())


def profile_proof(wanted: Provider, events: Sequence[Mapping[str, Any]]) -> Proof:
    """Whether every kernel of a profile ran on the provider, and none copied between memories."""
    kernels = kernels_of(events)
    ran = [(str(e["args"].get("provider")), f"{e['args'].get('op_name')} {e['name']}") for e in kernels]
    copies = [operator for _, operator in ran if operator.startswith(COPIES)]
    if copies:
        return Proof("profile", False, f"{len(copies)} copies between memories, e.g. {copies[0]}")
    return whole(wanted, ran, "profile", "run by")


def whole(wanted: Provider, nodes: Sequence[tuple[str, str]], name: str, verb: str) -> Proof:
    counts = Counter(provider for provider, _ in nodes)
    listing = ", ".join(f"{count} nodes {verb} {provider}" for provider, count in counts.most_common()) or "no node"
    strays = [operator for provider, operator in nodes if provider not in wanted.names]
    if strays:
        listing += f" (PARTIAL: {len(strays)} elsewhere, e.g. {', '.join(strays[:3])})"
    return Proof(name, bool(nodes) and not strays, listing)


def binding_proof(memory: str, devices: set[str]) -> Proof:
    """Whether inputs and outputs lay in the provider's memory."""
    return Proof("binding", devices == {memory}, f"inputs and outputs on {', '.join(sorted(devices))}")


def replay_proof(bound: Bound, plain: Bound, feeds: Mapping[str, Any]) -> Proof:
    """Whether runs read what lies in their buffers now: on other inputs a session without a captured graph agrees.

    A graph that was captured with other addresses answers with what it saw first. The inputs are put back.
    """
    other = {name: value if value.ndim < 2 else np.ascontiguousarray(np.flip(value)) for name, value in feeds.items()}
    answers = []
    for each in (bound, plain):
        each.put(other)
        answers.append(each.answer())
    bound.put(feeds)
    same = all(np.allclose(a, b, rtol=1e-2, atol=1e-2 * np.abs(b).max()) for a, b in zip(*answers, strict=True))
    seen = "a replay answers other inputs as a run does" if same else "a replay answers other inputs with old values"
    return Proof("binding", same, seen)


def best_provider(path: str | Path, feeds: Mapping[str, Any], free_dims: Mapping[str, int], dtype: str) -> Placement:
    """The first provider, best first, that can be proved; ``refused`` says why not the ones before it.

    Raises HardwareUnproved if none can.
    """
    refused = {}
    for name, provider in PROVIDERS.items():
        if dtype not in provider.dtypes:
            refused[name] = f"computes {dtype} in fp32"
            continue
        try:
            placement, _ = prove(path, name, feeds, free_dims)
        except HardwareUnproved as error:
            refused[name] = str(error)
            continue
        placement.refused = refused
        return placement
    raise HardwareUnproved("no provider is proved: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))
