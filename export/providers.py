"""Which hardware runs a model, and the proof that it did.

ONNX Runtime falls back to the CPU without an exception, even where told not to; so no single answer of its is believed.
Needs neither torch nor a GPU to be imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import subprocess
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput, HardwareUnproved, nearest
from diffprune_plugin.utils.optional import need

CPU_PROVIDER = "CPUExecutionProvider"


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
