"""A whole pipeline as a directory of ONNX files in optimum-onnx's layout, each compared with PyTorch."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from diffprune_plugin.adapters.ports import config_of
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.export.baseline import allowed
from diffprune_plugin.export.components import (
    DECODER,
    ENCODER,
    LEFT_OUT,
    MODEL_FILE,
    PARTS,
    SEQUENCE,
    Piece,
    part_to_onnx,
    parts_of,
)
from diffprune_plugin.export.convert import IMAGE, ExportReport, model_in, to_onnx
from diffprune_plugin.export.feeds import input_names, input_types
from diffprune_plugin.export.integrity import read_provenance
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.ort_pipeline import pipeline_class
from diffprune_plugin.export.precision import DTYPES
from diffprune_plugin.export.scheduler import pipeline_scheduler
from diffprune_plugin.export.verify import Verification, summary, verify_onnx
from diffprune_plugin.export.verify_parts import verify_part
from diffprune_plugin.plugins import adapters, components, find_adapter, plugin_manager
from diffprune_plugin.pruning.building import foreign_errors
from diffprune_plugin.pruning.directory import component_in, read_json, to_json
from diffprune_plugin.pruning.index import INDEX_FILE, is_pipeline_module, read_index
from diffprune_plugin.pruning.loading import quiet
from diffprune_plugin.pruning.weights import variant_of

SMALL = 16  # sides of latents for the checks of parts whose height and width are dynamic
STEPS = (20, 25, 30, 50)  # numbers of steps that people draw with
Say = Callable[[str], None]
Facts = dict[str, Any]


def check_pipeline(model: Path, options: Options) -> dict[str, tuple[str, str]]:
    """The components of a pipeline directory (library and class) that can be exported; raises BadInput if it cannot."""
    if not (model / INDEX_FILE).is_file():
        raise BadInput(f"{model}: no {INDEX_FILE}; a directory of ONNX files needs a pipeline, a model a name in .onnx")
    parts, denoiser = read_index(model), component_in(model)
    for name, (_, kind) in parts.items():
        if name not in LEFT_OUT and name != denoiser and has_weights(model / name):
            parts_of(name, kind)
    optional = {*pipeline_class(model)._optional_components}
    if beyond := [name for name in LEFT_OUT if name in parts and name not in optional]:
        kind = pipeline_class(model).__name__
        raise BadInput(
            f"{', '.join(beyond)}: has no ONNX form, and a {kind} does not draw without; export the UNet alone: name a "
            "file that ends in .onnx"
        )
    if "text_encoder" in parts and "batch" not in options.dynamic:
        raise BadInput(f"--dynamic {','.join(options.dynamic)}: guidance doubles the batch; leave batch among them")
    return parts


def has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def export_parts(model: Path, place: Path, options: Options, provider: str, say: Say, found: Facts) -> None:
    """Write every component of a pipeline directory below ``place``, each compared with PyTorch unless not asked to.

    ``found`` gets what each export and comparison found, by folder. Raises CheckFailed where one missed.
    """
    parts, denoiser = check_pipeline(model, options), component_in(model)
    options = replace(options, timestep=timestep_kind(model, options, say), dynamic=open_axes(model, options, say))
    keep(found, denoiser, *export_denoiser(model, place / denoiser, options, provider), say)
    side = read_side(place / denoiser / MODEL_FILE)
    for name, (library, kind) in parts.items():
        if name in (denoiser, *LEFT_OUT):
            continue
        if kind in PARTS:
            for each in export_component(model, place, name, library, kind, side, options, provider, say):
                keep(found, *each, say)
        elif (model / name).is_dir():
            shutil.copytree(model / name, place / name)
            add_vocabulary(place / name)
    left_out = [name for name in LEFT_OUT if name in parts]
    if left_out:
        say(f"left out, as they have no ONNX form: {', '.join(left_out)}")
    write_index(model, place, denoiser, left_out)


def add_vocabulary(folder: Path) -> None:
    """Beside a tokenizer.json, alone as transformers 5 writes it, the files that transformers 4 reads in its place."""
    whole = folder / "tokenizer.json"
    model = read_json(whole).get("model", {}) if whole.is_file() else {}
    if model.get("type") == "BPE" and not (folder / "vocab.json").exists():
        merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def timestep_kind(model: Path, options: Options, say: Say) -> str:
    """The type of the timestep: as asked, and float32 where the pipeline's own scheduler steps between whole ones."""
    if options.timestep != "int64" or not scheduler_between(model, (options.steps, *STEPS)):
        return options.timestep
    live = model_in(model)
    if not find_adapter(live).real_timesteps(config_of(live)):
        return options.timestep
    say("timestep: float32, since the pipeline's scheduler steps between whole ones")
    return "float32"


def open_axes(model: Path, options: Options, say: Say) -> tuple[str, ...]:
    """The axes left open: as asked, and ``sequence`` where captions have other than the usual tokens."""
    parts = read_index(model)
    conditional, tokens = parts[component_in(model)][1].endswith("UNet2DConditionModel"), tokens_of(model)
    if not conditional or tokens == SEQUENCE or "sequence" in options.dynamic:
        return options.dynamic
    say(f"sequence: left open, since captions have {tokens} tokens and not {SEQUENCE}")
    return (*options.dynamic, "sequence")


def tokens_of(pipeline: Path) -> int:
    """Of a caption, which is filled up to what the tokenizer says, where it goes into CLIP's text encoder."""
    file = pipeline / "tokenizer" / "tokenizer_config.json"
    known = file.is_file() and (pipeline / "text_encoder").is_dir()
    return int(read_json(file).get("model_max_length", SEQUENCE)) if known else SEQUENCE


def open_in(path: Path) -> tuple[str, ...]:
    """The axes that a file was written with open."""
    return tuple(word for word in read_provenance(path)["dynamic"].split(",") if word)


def timestep_of(path: Path) -> str:
    """The type of the timestep that a denoiser's file takes."""
    return str(input_types(path)[input_names(read_provenance(path))["timestep"]])


def scheduler_between(model: Path, counts: tuple[int, ...]) -> bool:
    """Whether a pipeline's scheduler has timesteps between whole ones, for one of these numbers of steps."""
    library, kind = read_index(model).get("scheduler", ("diffusers", ""))
    if not kind:
        return False
    with foreign_errors(f"{model / 'scheduler'}: cannot be loaded as a {kind}"):
        scheduler = getattr(importlib.import_module(library), kind).from_pretrained(str(model / "scheduler"))
        total = int(scheduler.config.get("num_train_timesteps", 1000))
        for count in (each for each in counts if each <= total):
            scheduler.set_timesteps(count)
            steps = torch.as_tensor(scheduler.timesteps)
            if steps.is_floating_point() and bool((steps != steps.round()).any()):
                return True
    return False


def export_denoiser(
    model: Path, folder: Path, options: Options, provider: str
) -> tuple[ExportReport, Verification | None]:
    """The denoiser's file, verified as a file of its own is."""
    path = folder / MODEL_FILE
    folder.mkdir()
    report = to_onnx(model, path, **options.of_file())
    gc.collect()  # the exporter's program holds the weights in cycles
    config = json.loads(report.provenance["config"]) | {"_class_name": report.provenance["model_class"]}
    (folder / "config.json").write_text(to_json(config))
    if not options.verify:
        return report, None
    size = small(options, read_side(path))
    tolerance, of_dense = allowed(model, path, options, provider, size)
    result = verify_onnx(
        path,
        model,
        scheduler=pipeline_scheduler(model),
        steps=options.steps,
        provider=provider,
        threads=options.threads,
        tolerance=tolerance,
        size=size,
    )
    result.dense = of_dense
    return report, result


def export_component(
    model: Path,
    place: Path,
    name: str,
    library: str,
    kind: str,
    side: tuple[int, int],
    options: Options,
    provider: str,
    say: Say,
) -> Iterator[tuple[str, ExportReport, Verification | None]]:
    """The files of one component other than the denoiser: folder, export and comparison of each."""
    live = load_component(model / name, library, kind)
    for part in parts_of(name, kind):
        folder = place / (name + part.ending)
        folder.mkdir()
        dtype = options.dtype
        upcast = part is ENCODER and live.config.get("force_upcast")  # diffusers then encodes in fp32
        if dtype == "fp16" and (upcast or (part is DECODER and overflows(live, side))):
            say(f"{folder.name}: kept in fp32, since it overflows in fp16")
            dtype = "fp32"
        cast = live if dtype == "fp32" else copy.deepcopy(live).to(DTYPES[dtype])
        report = part_to_onnx(
            Piece(part, cast, side), folder / MODEL_FILE, opset=options.opset, dynamic=options.dynamic, dtype=dtype
        )
        shutil.copy(model / name / "config.json", folder / "config.json")
        result = None
        if options.verify:
            piece = Piece(part, live, small(options, side) or side)
            result = verify_part(folder / MODEL_FILE, piece, provider=provider, threads=options.threads)
        yield folder.name, report, result


def keep(found: Facts, name: str, report: ExportReport, result: Verification | None, say: Say) -> None:
    """Write down what was found of one file, by its folder; the place on this machine is left out.

    Raises CheckFailed where the numerics miss; nothing of the directory stays then.
    """
    found[name] = {"export": asdict(report) | {"path": f"{name}/{MODEL_FILE}"}}
    if result is None:
        return
    found[name]["verify"] = result.as_dict()
    if not result.passed:
        raise CheckFailed(f"{name}/{MODEL_FILE} does not compute what PyTorch does: {summary(result)}")
    say(f"{name}: verified against PyTorch on {result.provider}: {summary(result)}")


def load_component(folder: Path, library: str, kind: str) -> Any:
    """A component's model in fp32 and eval mode; raises BadInput for a damaged one."""
    name = f"diffusers.pipelines.{library}" if is_pipeline_module(library) else library
    with foreign_errors(f"{folder}: cannot be loaded as a {kind}"), quiet():
        cls = getattr(importlib.import_module(name), kind)
        variant = variant_of(folder, None)
        return cls.from_pretrained(str(folder), use_safetensors=True, variant=variant).float().eval()


@torch.no_grad()
def overflows(vae: Any, side: tuple[int, int]) -> bool:
    """Whether a decoder leaves fp16's range: its config says so (SDXL), or latents of unit noise do, tried in fp16."""
    if vae.config.get("force_upcast"):
        return True
    half = copy.deepcopy(vae).half()
    sides = [min(length, SMALL) for length in side]
    latents = torch.randn((1, vae.config.latent_channels, *sides), generator=torch.Generator().manual_seed(0))
    latents = latents / (vae.config.get("scaling_factor") or 1.0)
    return not bool(half.decode(latents.half(), return_dict=False)[0].isfinite().all())


def small(options: Options, side: tuple[int, int]) -> tuple[int, int] | None:
    """Sides of a latent that are cheap to check with, where they are dynamic; None where they are the config's."""
    if not set(IMAGE) <= set(options.dynamic) or max(side) <= SMALL:
        return None
    return SMALL, SMALL


def read_side(path: Path) -> tuple[int, int]:
    """(height, width) of a sample of a denoiser's file."""
    axes = json.loads(read_provenance(path)["axes"])
    return axes["height"], axes["width"]


def write_index(model: Path, place: Path, denoiser: str, left_out: list[str]) -> None:
    """``model_index.json``: the pipeline's own, the denoiser by its stock class, what is left out as nothing."""
    index = read_json(model / INDEX_FILE)
    facts = read_provenance(place / denoiser / MODEL_FILE)
    adapter = adapters(plugin_manager())[facts["model_class"]].value
    index[denoiser] = [adapter.module, adapter.model_class]
    index |= {name: [None, None] for name in left_out}
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (place / INDEX_FILE).write_text(to_json(index))


def denoiser_file(place: Path) -> Path:
    """The denoiser's file in a directory of ONNX files."""
    return next(path for name in components() if (path := place / name / MODEL_FILE).is_file())
