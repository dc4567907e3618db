"""Whether an ONNX file computes what PyTorch computes: every batch, timestep and axis, and a sampling run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffprune_plugin.adapters.ports import config_of
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.diffusion.inputs import check_time_table
from diffprune_plugin.export.convert import IMAGE, model_in, odd_multiple
from diffprune_plugin.export.feeds import input_shapes, input_types, multiples
from diffprune_plugin.export.integrity import Files, check_files, read_manifest, reject
from diffprune_plugin.export.ort_session import OrtSession, RunFailed
from diffprune_plugin.export.precision import ends
from diffprune_plugin.export.provider_table import TF32
from diffprune_plugin.export.providers import known_provider
from diffprune_plugin.export.scheduler import ddim_of
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.utils.exact import exact_float32

BATCHES = (1, 2, 3, 5)
TIMESTEPS = (0, 1, 10, 500, 999)
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tolerance:
    """The largest error allowed: ``absolute`` plus ``relative`` times the largest value of PyTorch's output."""

    relative: float
    absolute: float


# fp32: ten times what the graphs show; fp16 against fp32 PyTorch: four times.
TOLERANCES = {"fp32": Tolerance(1e-5, 1e-6), "fp16": Tolerance(5e-3, 1e-3)}
ON_GPU = {"fp32": Tolerance(1e-4, 1e-5)}  # sums in another order
WITH_TF32 = {"fp32": Tolerance(5e-3, 1e-3)}  # products of ten bits, as fp16 has; it errs by 5e-4 and more


def tolerance_of(provider: str, dtype: str) -> Tolerance:
    """The tolerance for a file of a type on a provider."""
    row = known_provider(provider)
    on_gpu = WITH_TF32 if row.is_on(TF32) else ON_GPU
    return (on_gpu if row.is_gpu else {}).get(dtype, TOLERANCES[dtype])


def finite(error: float) -> float | None:
    """None for an error without an end, which JSON has no number for."""
    return error if math.isfinite(error) else None


@dataclass(frozen=True)
class Case:
    """One comparison: what was tried, the largest error, absolute and relative to the largest output, the verdict."""

    name: str
    absolute: float
    relative: float
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"absolute": finite(self.absolute), "relative": finite(self.relative)}


@dataclass
class Verification:
    """All cases of one file; ``sampling`` holds the error after each step of a free run, for reading only, ``dense``
    the dense model's own error in halves where that says what is allowed."""

    provider: str
    dtype: str
    tolerance: Tolerance
    cases: list[Case] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    dense: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.cases) and all(case.passed for case in self.cases)

    @property
    def worst(self) -> Case:
        """The first case that failed, else the one with the largest relative error."""
        missed = [case for case in self.cases if not case.passed]
        return missed[0] if missed else max(self.cases, key=lambda case: case.relative)

    def as_dict(self) -> dict[str, Any]:
        cases, errors = [case.as_dict() for case in self.cases], [finite(error) for error in self.sampling]
        found = {"cases": cases, "sampling": errors, "passed": self.passed, "worst": self.worst.as_dict()}
        return {key: value for key, value in (asdict(self) | found).items() if key != "dense" or value}


def verify_onnx(
    path: str | Path,
    model: nn.Module | str | Path,
    *,
    scheduler: Any = None,
    steps: int = 10,
    batches: Sequence[int] = BATCHES,
    provider: str = "cpu",
    threads: int = 1,
    tolerance: Tolerance | None = None,
    size: tuple[int, int] | None = None,
    adapter: ModelAdapter | None = None,
    files: Files | None = None,
) -> Verification:
    """Compare an ONNX file with its PyTorch model; a file that misses is renamed ``*.rejected`` with all of its files.

    ``scheduler``: also ``steps`` DDIM steps with its settings, each prediction compared on PyTorch's own trajectory.
    ``size``: (height, width) of the samples where these axes are dynamic, instead of the config's.
    ``files``: what the manifest said of it when it was written; one that has been replaced since is not renamed.

    Raises BadInput for a damaged file, or one that is not ours, before a session opens it, and for more steps than the
    scheduler has; CheckFailed if another export has replaced a file that misses.
    """
    path = Path(path)
    facts, known = check_files(path), files or read_manifest(path)["files"]
    dtype = facts["dtype"]
    live = model_in(model)
    subject = Subject(live, adapter or find_adapter(live), size)
    if scheduler is not None:
        check_time_table(live, subject.adapter, scheduler)
    ddim = None if scheduler is None else ddim_of(scheduler, steps)
    result = Verification(provider, dtype, tolerance or tolerance_of(provider, dtype))
    shapes, timestep = input_shapes(path), subject.adapter.timestep
    if missing := sorted(set(subject.example()) ^ set(shapes)):
        result.cases.append(failed(f"inputs: {', '.join(missing)} only in the graph or only in the model"))
    elif shapes[timestep] == ["batch"]:  # some graphs take a single one by luck of broadcasting
        result.cases.append(failed(f"{timestep} has the batch's length only, where clients feed one for all samples"))
    else:
        session = OrtDenoiser(path, provider, threads)
        with torch.no_grad():
            for name, inputs in all_cases(subject, path, batches, multiples(facts)):
                result.cases.append(compared(name, session, subject, inputs, result.tolerance))
            try:
                if dtype != "fp32" and dtype in known_provider(provider).dtypes:
                    result.cases.append(finite_at_both_ends(session, subject))
                result.cases += dependence(session, subject, result.tolerance)
                if ddim is not None and result.passed:
                    sample(result, session, subject, ddim)
            except RunFailed as error:
                result.cases.append(failed(f"batch 1 again: {error}"))
        del session
    if not result.passed:
        result.rejected = [renamed.name for renamed in reject(path, known)]
    return result


class OrtDenoiser(OrtSession):
    """A session whose one output is what is compared."""

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return next(iter(super().__call__(inputs).values()))


@dataclass(frozen=True)
class Subject:
    """The PyTorch model, and inputs for it of one sample size."""

    model: nn.Module
    adapter: ModelAdapter
    size: tuple[int, int] | None

    def example(self, batch: int = 1, seed: int = 0) -> Inputs:
        return self.adapter.flat_inputs(self.model, batch=batch, size=self.size, seed=seed)

    def taken(self, timestep: int) -> int:
        """The timestep, or the nearest that the model takes."""
        steps = self.adapter.tried_timesteps(config_of(self.model))
        return max(steps[0], min(timestep, steps[-1]))

    @exact_float32()
    def denoise(self, inputs: Inputs) -> torch.Tensor:
        """PyTorch's output, in whole float32; one timestep for all samples is repeated for it."""
        names, rows = self.adapter, len(inputs[self.adapter.sample])
        return names.denoise(self.model, inputs | {names.timestep: inputs[names.timestep].expand(rows)})

    def axes(self) -> Iterator[tuple[str, int, str]]:
        """(input, position, word) of each axis that may be dynamic."""
        config = config_of(self.model)
        return ((p.name, i, word) for p in self.adapter.ports(self.model) for i, word in p.words(config).items())


def all_cases(
    subject: Subject, path: Path, batches: Sequence[int], steps: Mapping[str, int]
) -> Iterator[tuple[str, Inputs]]:
    """Every batch with every timestep, as many in one run as fit; one for all, as clients feed it; then every other
    dynamic axis at other sizes.

    ``steps``: what the file says that their sizes have to be multiples of.
    """
    shapes, name = input_shapes(path), subject.adapter.timestep
    dynamic = {axis for input_, shape in shapes.items() for axis in shape if isinstance(axis, str) and input_ != name}
    for batch in batches if "batch" in dynamic else (1,):
        for start in range(0, len(TIMESTEPS), batch):
            inputs = subject.example(batch, seed=start)
            rows = [subject.taken(TIMESTEPS[(start + row) % len(TIMESTEPS)]) for row in range(batch)]
            times = [row * subject.adapter.model_time for row in rows]
            inputs[name] = torch.tensor(times, dtype=inputs[name].dtype, device=inputs[name].device)
            yield f"batch {batch}, timestep {', '.join(map(str, rows))}", inputs
    if "batch" in dynamic:
        batch = max(2, min(batches))
        for timestep in single_timesteps(subject, input_types(path)[name].kind == "f"):
            inputs = subject.example(batch)
            scale = subject.adapter.model_time
            single = torch.tensor([timestep if scale == 1 else timestep * scale], device=inputs[name].device)
            yield f"batch {batch}, one timestep {timestep} for all", inputs | {name: single}
    for word in sorted(dynamic - {"batch"}):
        for size in other_sizes(subject, word, steps.get(word)):
            yield f"{word} {size}", resized(subject, word, size)


def single_timesteps(subject: Subject, reals: bool) -> list[float]:
    """The first and the last that the model takes, and where the file takes reals two between whole ones."""
    ends = [subject.taken(TIMESTEPS[0]), subject.taken(TIMESTEPS[-1])]
    return [*ends, *([ends[0] + 0.5, ends[1] - 0.625] if reals else [])]


def other_sizes(subject: Subject, word: str, multiple: int | None) -> list[int]:
    """Other sizes for an axis, one larger, one smaller where there is room; images in steps of the whole depth, and
    one that is as odd as the file allows."""
    example = subject.example()
    now = next(example[name].shape[i] for name, i, axis in subject.axes() if axis == word)
    depths = dict(zip(IMAGE, subject.adapter.trace_size(subject.model), strict=True))
    step = depths.get(word, 1)
    sizes = [now + step, now // 2 // step * step or now + 2 * step]
    return sizes + ([odd_multiple(now + step, multiple)] if multiple and multiple < step else [])


def resized(subject: Subject, word: str, size: int) -> Inputs:
    """The inputs with one axis repeated or cut to a size."""
    inputs = subject.example()
    for name, index, axis in subject.axes():
        if axis == word:
            tensor = inputs[name]
            kept = torch.arange(size, device=tensor.device) % tensor.shape[index]
            inputs[name] = tensor.index_select(index, kept)
    return inputs


def compared(name: str, session: OrtDenoiser, subject: Subject, inputs: Inputs, tolerance: Tolerance) -> Case:
    """The file's output against PyTorch's for the same inputs; an output that is not finite or fails has missed."""
    expected = subject.denoise(inputs).float().cpu()
    try:
        found = session(inputs)
    except RunFailed as error:
        return failed(f"{name}: {error}")
    if found.shape != expected.shape:
        return failed(f"{name}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    return judged(name, found, expected, tolerance)


def failed(name: str) -> Case:
    return Case(name, math.inf, math.inf, False)


def judged(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Case:
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    limit = tolerance.absolute + tolerance.relative * scale
    # NaN compares false, so a NaN anywhere has missed.
    return Case(name, error, error / scale if scale else error, error <= limit)


def dependence(session: OrtDenoiser, subject: Subject, tolerance: Tolerance) -> Iterator[Case]:
    """Whether the file's output changes with each input that PyTorch's output changes with."""
    inputs, others = subject.example(), subject.example(seed=1)
    name = subject.adapter.timestep
    last = subject.taken(TIMESTEPS[-1]) * subject.adapter.model_time
    others[name] = torch.full_like(inputs[name], last)
    found, expected = session(inputs), subject.denoise(inputs)
    for name, tensor in others.items():
        if bool((tensor == inputs[name]).all()):
            flipped = inputs[name].flip(-1)
            constant = bool((flipped == inputs[name]).all())  # FLUX's guidance, places of its text
            real = inputs[name] + 1 if constant else flipped
            others[name] = tensor = real if tensor.is_floating_point() else (inputs[name] + 1) % 2
        changed = inputs | {name: tensor}
        moved = float((session(changed) - found).abs().max())
        meant = float((subject.denoise(changed) - expected).abs().max())
        limit = tolerance.absolute + tolerance.relative * float(expected.abs().max())
        depends = moved > meant / 2 or meant <= limit
        yield Case(f"output depends on {name}", 0.0 if depends else meant, 0.0, depends)


def finite_at_both_ends(session: OrtDenoiser, subject: Subject) -> Case:
    """Whether the file's outputs are finite at 50 timesteps from both ends: half precision may fail at one alone."""
    inputs, name, tried = subject.example(), subject.adapter.timestep, ends(subject.model, subject.adapter)
    for step in tried:
        at = torch.full_like(inputs[name], step * subject.adapter.model_time)
        if not bool(session(inputs | {name: at}).isfinite().all()):
            return failed(f"not finite at timestep {step}")
    return Case(f"finite at {len(tried)} timesteps", 0.0, 0.0, True)


def sample(result: Verification, session: OrtDenoiser, subject: Subject, ddim: Any) -> None:
    """DDIM from the same noise: a case for each prediction on PyTorch's trajectory, and the error of a free run.

    Where the model takes more channels than it gives (inpainting), those behind stay what they are.
    """
    names, inputs = subject.adapter, subject.example()
    ours = theirs = inputs[subject.adapter.sample]
    for timestep in ddim.timesteps:
        rows = torch.full((len(theirs),), subject.taken(int(timestep))).to(inputs[names.timestep])
        expected = subject.denoise(inputs | {names.sample: theirs, names.timestep: rows})
        found = session(inputs | {names.sample: theirs, names.timestep: rows})
        result.cases.append(
            judged(f"sampling, timestep {int(timestep)}", found, expected.float().cpu(), result.tolerance)
        )
        free = session(inputs | {names.sample: ours, names.timestep: rows}).to(ours)
        ours, theirs = stepped(ddim, free, timestep, ours), stepped(ddim, expected, timestep, theirs)
        result.sampling.append(float((ours - theirs).abs().max()))


def stepped(ddim: Any, prediction: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The sample one step on; both (batch, channels, height, width), with channels of their own each."""
    channels = min(prediction.shape[1], sample.shape[1])
    moved = ddim.step(prediction[:, :channels], timestep, sample[:, :channels]).prev_sample
    return torch.cat([moved, sample[:, channels:]], 1)


def summary(result: Verification) -> str:
    """The verdict in a line that names the case."""
    worst = result.worst
    if result.passed:
        error = f"{worst.relative:.1e} relative, {worst.absolute:.1e} absolute"
        return f"{len(result.cases)} cases hold; largest error {error}"
    return (
        f"{worst.name}: error {worst.absolute:.1e} ({worst.relative:.1e} relative), allowed "
        f"{result.tolerance.absolute:.0e} + {result.tolerance.relative:.0e} relative"
    )
