"""Which hardware runs a model, and the proof that it did.

ONNX Runtime falls back to the CPU without an exception, even where told not to; so no single answer of its is believed.
Needs neither torch nor a GPU to be imported; the rows are in provider_table.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import subprocess
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput, HardwareUnproved, nearest
from diffprune_plugin.export.integrity import parse
from diffprune_plugin.export.provider_table import NO_TF32, PROVIDERS, TF32, Provider
from diffprune_plugin.utils.optional import need


def known_provider(spec: str) -> Provider:
    """The provider of a name, or of one with options, ``cuda:prefer_nhwc=1,enable_cuda_graph=1``.

    Raises BadInput for one that is not known, or does not take such an option.
    """
    name, _, rest = spec.partition(":")
    if name not in PROVIDERS:
        raise BadInput(f"--provider {name!r}{nearest(name, PROVIDERS)}: not one of {', '.join(sorted(PROVIDERS))}")
    return PROVIDERS[name].with_options(options_of(filter(None, rest.split(","))))


def options_of(words: Iterable[str]) -> dict[str, str]:
    """Options by key; raises BadInput for a word that is not KEY=VALUE, or a key that is given twice."""
    found: dict[str, str] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not (key and sign and value) or ":" in key:
            raise BadInput(f"--provider-option {word!r}: give KEY=VALUE, for example prefer_nhwc=1")
        if found.setdefault(key, value) != value:
            raise BadInput(f"--provider-option {key}: given as {found[key]} and as {value}; give it once")
    return found


def spec_of(name: str, words: Iterable[str] = (), cuda_graph: bool = False, nhwc: bool = False) -> str:
    """What `known_provider` reads, for a name and its options; raises BadInput for options that it has not."""
    row, words = known_provider(name), list(words)
    for asked, flag, option in ((cuda_graph, "--cuda-graph", row.graph_option), (nhwc, "--nhwc", row.nhwc_option)):
        if asked and not option:
            able = [n for n, p in PROVIDERS.items() if (p.graph_option if flag == "--cuda-graph" else p.nhwc_option)]
            raise BadInput(f"{flag}: {name} has no option for it; {', '.join(able)} has")
        words += [f"{option}=1"] if asked else []
    spec = ",".join(f"{key}={value}" for key, value in options_of(words).items())
    known_provider(f"{name}:{spec}")
    return f"{name}:{spec}" if spec else name


def without_replay(spec: str) -> str:
    """The same provider without a captured graph, which takes one shape and one set of buffers only."""
    name, _, rest = spec.partition(":")
    kept = [
        word for word in filter(None, rest.split(",")) if word.partition("=")[0] != known_provider(name).graph_option
    ]
    return spec_of(name, kept)


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
    arena: bool = True,
) -> Any:
    """A session on one provider, with fixed dims and without spinning threads.

    ``all_nodes``: refuse to open if a node would be left to the CPU; ``profile``: prefix of a profile to be written.
    ``arena``: keep what a run took on the CPU for the next; it grows in powers of two, to several times as much.

    Raises HardwareUnproved if the session that opened is not the provider's.
    """
    ort, wanted = need("onnxruntime"), known_provider(provider)
    prepare(wanted)
    name = next(iter(built_in(wanted)), wanted.name)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = arena
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for word, size in (free_dims or {}).items():
        options.add_free_dimension_override_by_name(word, size)
    if all_nodes and not wanted.fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the silent fallback's only trace; what opened is checked below
            session = ort.InferenceSession(
                str(path), options, providers=[(name, of_file(wanted, threads, Path(path)))], enable_fallback=0
            )
    except Exception as error:
        kind = BadInput if wanted.fallback else HardwareUnproved
        raise kind(f"no {provider} session for {path}: {' '.join(str(error).split())[:300]}") from error
    found = session.get_providers()
    if not found or found[0] not in wanted.names:
        raise HardwareUnproved(f"asked for {name}, the session has {', '.join(found)} (silent fallback)")
    return session


def built_in(wanted: Provider) -> list[str]:
    """The names of the provider that this ONNX Runtime has it under: how it was built, not what runs."""
    available = need("onnxruntime").get_available_providers()
    return [name for name in wanted.names if name in available]


def provider_options(wanted: Provider, threads: int, halves: bool = False) -> dict[str, str]:
    """What the provider is opened with, for a file that holds ``halves`` or none."""
    given = {**(wanted.in_halves if halves else wanted.in_fp32), **wanted.options}
    return given | ({wanted.threads_option: str(threads)} if wanted.threads_option else {})


def opened_with(wanted: Provider, threads: int, path: Path) -> dict[str, str]:
    """The same for a file."""
    return provider_options(wanted, threads, bool(wanted.in_fp32 or wanted.in_halves) and has_halves(path))


def has_halves(path: Path) -> bool:
    """Whether some weight of an ONNX file is a float16."""
    half = need("onnx").TensorProto.FLOAT16
    return any(tensor.data_type == half for tensor in parse(path).graph.initializer)


def of_file(wanted: Provider, threads: int, path: Path) -> dict[str, str]:
    """The same, and what is built for the file, a TensorRT engine say, is kept in a folder of its own."""
    given = opened_with(wanted, threads, path)
    kept = [key for key in wanted.caches if key in given]
    of = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if kept else ""
    return given | {key: str(Path(given[key]) / of) for key in kept}


def prepare(wanted: Provider) -> None:
    """Set the provider's variables, for all of the process, and load what it needs from where pip has put it.

    Raises BadInput where TF32 is asked for and the process has it switched off already.
    """
    if wanted.is_on(TF32) and os.environ.get(NO_TF32) == "0":
        raise BadInput(
            f"{TF32}=1: {NO_TF32}=0 takes TF32 back, which this process or a session that it opened before has set; "
            "unset it and use a process of its own"
        )
    for variable, value in wanted.environment.items():
        os.environ.setdefault(variable, value)
    ort = need("onnxruntime")
    if wanted.is_gpu and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    for module in wanted.preload:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


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
