"""Which hardware runs a model, and the proof that it did.

ONNX Runtime falls back to the CPU without an exception, even where told not to; so no single answer of its is believed.
Needs neither torch nor a GPU to be imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffprune_plugin.errors import BadInput, HardwareUnproved, first_line, nearest, out_of_memory
from diffprune_plugin.export.integrity import need

CPU_PROVIDER = "CPUExecutionProvider"
COPIES = ("MemcpyFromHost", "MemcpyToHost")


@dataclass(frozen=True)
class Provider:
    """An execution provider: ONNX Runtime's name, the memory it computes in, its options, what brings it."""

    name: str
    memory: str
    install: str
    options: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("fp32", "fp16")


GPU_INSTALL = (
    "on a machine with an NVIDIA GPU and its driver: pip uninstall onnxruntime; "
    "pip install 'onnxruntime-gpu[cuda,cudnn]'"
)
# TF32 off (for TensorRT by `prepare`), so that a GPU's fp32 is fp32 in the check and in the timing alike. Best first.
PROVIDERS = {
    "tensorrt": Provider("TensorrtExecutionProvider", "cuda", GPU_INSTALL + " tensorrt"),
    "cuda": Provider("CUDAExecutionProvider", "cuda", GPU_INSTALL, {"device_id": "0", "use_tf32": "0"}),
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        "cpu",
        "pip uninstall onnxruntime; pip install onnxruntime-openvino openvino",
        {"device_type": "CPU"},
        dtypes=("fp32",),
    ),
    "cpu": Provider(CPU_PROVIDER, "cpu", "pip install onnxruntime", dtypes=("fp32",)),
}


@dataclass(frozen=True)
class Proof:
    """One of the five proofs: whether it held, and what was seen."""

    name: str
    held: bool
    seen: str


@dataclass
class Placement:
    """The proofs for one model on one provider, and what they were taken from."""

    provider: str
    proofs: list[Proof] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    device: str = ""
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def proved(self) -> bool:
        return len(self.proofs) == 5 and all(proof.held for proof in self.proofs)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"proved": self.proved}


def known_provider(name: str) -> Provider:
    """The provider of this name; raises BadInput for one that is not known."""
    if name not in PROVIDERS:
        raise BadInput(f"--provider {name!r}{nearest(name, PROVIDERS)}: not one of {', '.join(sorted(PROVIDERS))}")
    return PROVIDERS[name]


def check_dtype(provider: str, dtype: str) -> None:
    """Raises BadInput where the provider would compute in another type than the file's."""
    if dtype not in known_provider(provider).dtypes:
        raise BadInput(
            f"--provider {provider} computes {dtype} models in fp32, so that no {dtype} figure can come from it; "
            "use --dtype fp32 or a GPU"
        )


def distributions(installed: Iterable[str] | None = None) -> list[str]:
    """The onnxruntime distributions that are installed, of whatever flavour."""
    if installed is None:
        installed = (d.metadata["Name"] or "" for d in importlib.metadata.distributions())
    names = {name.lower().replace("_", "-") for name in installed}
    others = ("onnxruntime-extensions", "onnxruntime-genai")
    return sorted(n for n in names if n.startswith("onnxruntime") and not n.startswith(others))


def check_distribution(installed: Iterable[str] | None = None) -> str:
    """The one onnxruntime distribution there is.

    Raises BadInput for more than one: they share a directory, the last one wins and uninstalling either breaks it.
    """
    found = distributions(installed)
    if not found:
        need("onnxruntime")
    if len(found) > 1:
        raise BadInput(
            f"{len(found)} onnxruntime distributions are installed ({', '.join(found)}) and overwrite each other; "
            f"run: pip uninstall -y {' '.join(found)}; pip install {found[-1]}"
        )
    return found[0]


def open_session(
    path: str | Path,
    provider: str = "cpu",
    *,
    free_dims: Mapping[str, int] | None = None,
    threads: int = 1,
    all_nodes: bool = False,
    profile: Path | None = None,
) -> Any:
    """A session on one provider, with fixed dims and without spinning threads.

    ``all_nodes``: refuse to open if a node would be left to the CPU; ``profile``: prefix of a profile to be written.

    Raises HardwareUnproved if the session that opened is not the provider's.
    """
    ort, wanted = need("onnxruntime"), known_provider(provider)
    prepare(wanted)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for name, size in (free_dims or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    if all_nodes and wanted.name != CPU_PROVIDER:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the silent fallback's only trace; what opened is checked below
            session = ort.InferenceSession(
                str(path), options, providers=[(wanted.name, provider_options(wanted, threads))], enable_fallback=0
            )
    except Exception as error:
        kind = BadInput if wanted.name == CPU_PROVIDER else HardwareUnproved
        raise kind(f"no {provider} session for {path}: {' '.join(str(error).split())[:300]}") from error
    found = session.get_providers()
    if found[:1] != [wanted.name]:
        raise HardwareUnproved(f"asked for {wanted.name}, the session has {', '.join(found)} (silent fallback)")
    return session


def provider_options(wanted: Provider, threads: int) -> dict[str, str]:
    """What the provider is opened with; OpenVINO has threads of its own."""
    return dict(wanted.options) | ({"num_of_threads": str(threads)} if wanted.name.startswith("OpenVINO") else {})


def prepare(wanted: Provider) -> None:
    """Load what a GPU's provider needs from where pip has put it, and switch TF32 off for all of the process.

    TensorRT has no option for TF32, and reads the variable once, when it is loaded. Not run on a GPU yet.
    """
    if wanted.memory != "cuda":
        return
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    ort = need("onnxruntime")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    if wanted.name.startswith("Tensorrt"):
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt")


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
    placement = Placement(provider, versions=versions(distribution), options=provider_options(wanted, threads))

    def held(proof: Proof) -> None:
        placement.proofs.append(proof)
        if not proof.held:
            raise HardwareUnproved(f"{provider} is not proved: {proof.name}: {proof.seen}; to run it: {wanted.install}")

    held(device_proof(wanted))
    with tempfile.TemporaryDirectory() as folder:
        session, proof = session_proof(Path(path), provider, free_dims, threads, Path(folder))
        held(proof)
        held(assignment_proof(wanted.name, assigned_nodes(session)))
        try:
            bound = Bound(session, feeds, wanted.memory)
            bound.run()
        except Exception as error:
            if wanted.memory == "cpu" and out_of_memory(error):
                raise
            held(Proof("profile", False, f"it opens and does not run: {first_line(error)}"))
            raise
        held(profile_proof(wanted.name, json.loads(Path(session.end_profiling()).read_text())))
        held(binding_proof(wanted.memory, bound.devices()))
    placement.device = gpu() if wanted.memory == "cuda" else ""
    return placement, bound


def device_proof(wanted: Provider) -> Proof:
    """Whether a tensor can be put into the provider's memory; the list of providers only tells how it was built."""
    ort = need("onnxruntime")
    built = ort.get_available_providers()
    if wanted.name not in built:
        return Proof("device", False, f"this onnxruntime was built with {', '.join(built)} only")
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
            seen = assignment_proof(PROVIDERS[provider].name, nodes).seen
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


def assignment_proof(wanted: str, nodes: Sequence[tuple[str, str]]) -> Proof:
    """Whether every node was assigned to the provider."""
    return whole(wanted, nodes, "assignment", "assigned to")


def profile_proof(wanted: str, events: Sequence[Mapping[str, Any]]) -> Proof:
    """Whether every kernel of a profile ran on the provider, and none copied between memories."""
    kernels = [e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith("_kernel_time")]
    ran = [(str(e["args"].get("provider")), f"{e['args'].get('op_name')} {e['name']}") for e in kernels]
    copies = [operator for _, operator in ran if operator.startswith(COPIES)]
    if copies:
        return Proof("profile", False, f"{len(copies)} copies between memories, e.g. {copies[0]}")
    return whole(wanted, ran, "profile", "run by")


def whole(wanted: str, nodes: Sequence[tuple[str, str]], name: str, verb: str) -> Proof:
    counts = Counter(provider for provider, _ in nodes)
    listing = ", ".join(f"{count} nodes {verb} {provider}" for provider, count in counts.most_common()) or "no node"
    strays = [operator for provider, operator in nodes if provider != wanted]
    if strays:
        listing += f" (PARTIAL: {len(strays)} elsewhere, e.g. {', '.join(strays[:3])})"
    return Proof(name, bool(nodes) and not strays, listing)


def binding_proof(memory: str, devices: set[str]) -> Proof:
    """Whether inputs and outputs lay in the provider's memory."""
    return Proof("binding", devices == {memory}, f"inputs and outputs on {', '.join(sorted(devices))}")


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


def versions(distribution: str) -> dict[str, str]:
    ort = need("onnxruntime")
    return {distribution: importlib.metadata.version(distribution), "build": str(ort.get_build_info())[:200]}


def gpu() -> str:
    """Name, driver, clock and memory in use of the GPU that is device 0, from nvidia-smi; empty where there is none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    command = ["nvidia-smi", "-i", first]
    command += ["--query-gpu=name,driver_version,clocks.sm,memory.used", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
