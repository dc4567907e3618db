"""A pipeline directory to ONNX, every part and the whole proved; the directory is there whole or not at all."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffprune_plugin.diffusion.inputs import check_time_table
from diffprune_plugin.errors import BadInput, CheckFailed, HardwareUnproved
from diffprune_plugin.export.baseline import dense_file
from diffprune_plugin.export.benchmark import Latency, gate
from diffprune_plugin.export.drawing import Images, compared, draw, not_drawn, not_timed, summary
from diffprune_plugin.export.halves import with_kept_layers
from diffprune_plugin.export.integrity import VERDICT
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.ort_pipeline import ORTPipeline, pipeline_class
from diffprune_plugin.export.pipeline import check_pipeline, denoiser_file, export_parts, open_in, timestep_of
from diffprune_plugin.export.pipeline_latency import Shares, lines, measure_pipeline, prove_parts
from diffprune_plugin.export.providers import without_replay
from diffprune_plugin.export.report import write_page
from diffprune_plugin.export.verdict import Verdict, command, outcome, told, write_json
from diffprune_plugin.export.workflow import check_asked, check_placement, gated, provider_for, time_files
from diffprune_plugin.plugins import denoiser_of, find_adapter
from diffprune_plugin.pruning.card import verdict_lines, write_card
from diffprune_plugin.pruning.index import read_index
from diffprune_plugin.pruning.loading import load_pipeline
from diffprune_plugin.utils.files import check_absent, check_apart, new_directory, write_list

KIND = "ONNX pipeline"
Say = Callable[[str], None]


def run_pipeline(
    model: Path,
    output: Path,
    options: Options,
    say: Say = lambda line: None,
    show: Callable[[Latency], None] = lambda latency: None,
) -> Verdict:
    """Export a pipeline directory and prove it: each part's numerics, the images, latency of UNet and whole.

    The verdict lies beside the directory as JSON, with .rejected in its name where an earlier directory stays. Raises
    BadInput, CheckFailed or HardwareUnproved: with a part or an image that missed there is no directory, with a gate
    that missed there is one.
    """
    check_absent(output, options.overwrite, KIND)
    check_apart(output, {"--model": str(model), "--baseline": str(options.baseline) if options.baseline else None})
    check_asked(model, options)
    check_pipeline(model, options)
    check_honoured(model, options)
    verdict = Verdict({"passed": False, "model": told(model), "directory": told(output), "failure": "interrupted"})
    verdict.content["command"] = command(model, output, options)
    # Until a directory takes the place of an earlier one, what is told is not of that.
    ending = f".rejected{VERDICT}" if output.exists() else VERDICT
    try:
        with outcome(verdict.content, [model, output, options.baseline]):
            options = with_kept_layers(model, options, say)
            with new_directory(output, options.overwrite, KIND) as place:
                build(verdict, model, place, options, say)
                if options.check_placement:
                    unet = denoiser_file(place)
                    check_placement(verdict.content, unet, options.check_placement, options.batches[0], say)
                time_both(verdict, model, place, options, say, show)
                missed = missed_gate(verdict, options)
                told_of = {**verdict.content, "passed": missed is None, "failure": str(missed)}
                write_card(place, model, proofs={"the export": verdict_lines(told_of)})
                for stale in (VERDICT, f".rejected{VERDICT}"):  # of the directory that goes
                    output.with_name(output.name + stale).unlink(missing_ok=True)
            ending = VERDICT
            if missed is not None:
                raise missed
    finally:
        write_json(options.verdict or output.with_name(output.name + ending), verdict.content)
        write_page(options.report, verdict)
    return verdict


def check_honoured(model: Path, options: Options) -> None:
    """Raises BadInput for what a file can be asked for and this directory cannot."""
    if options.torch:
        raise BadInput("--torch: PyTorch is timed beside one file, not a pipeline; leave it out, or name an .onnx file")
    if gated(options) and (why := not_timed(pipeline_class(model), read_index(model))):
        remedy = "leave them out, or export the denoiser alone, to a name in .onnx"
        raise BadInput(f"--min-speedup, --max-latency-ms: no image of {model} is timed: {why}; {remedy}")


def missed_gate(verdict: Verdict, options: Options) -> CheckFailed | None:
    """What a gate says that the images' latency misses: the directory is there nevertheless, and its card says so."""
    try:
        if verdict.latency:
            gate(verdict.latency, options.max_latency_ms, options.min_speedup)
    except CheckFailed as error:
        return error
    return None


def build(verdict: Verdict, model: Path, place: Path, options: Options, say: Say) -> None:
    """All files, and the images that they draw beside PyTorch's: drawn first, so that memory holds one of the two."""
    content = verdict.content
    expected, why = pytorch_images(model, options) if options.verify else ({}, "left out (--no-verify)")
    content["parts"] = {}
    export_parts(model, place, options, options.checking_provider, say, content["parts"])
    write_list(place, KIND)
    content["images"] = why
    if expected:
        check_images(verdict, place, expected, options, say)
    else:
        say("NOT verified (--no-verify)" if not options.verify else f"images not compared: {why}")


def pytorch_images(model: Path, options: Options) -> tuple[dict[int, Images], str]:
    """PyTorch's images by batch size; none and why, for a pipeline that is not drawn from."""
    pipeline = load_pipeline(model)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it has no ONNX form, and what it blacks out could not be compared
    denoiser = denoiser_of(pipeline)[1]
    check_time_table(denoiser, find_adapter(denoiser), pipeline.scheduler)
    if why := not_drawn(type(pipeline), [name for name, part in pipeline.components.items() if part is not None]):
        return {}, why
    batches = options.drawn if "batch" in options.dynamic else (1,)
    try:
        images = {batch: draw(pipeline, batch, options.steps) for batch in batches}
    except BadInput as error:
        raise BadInput(f"{error}; mend {model}, or leave the comparison out: --no-verify") from error
    del pipeline
    gc.collect()
    return images, ""


def check_images(verdict: Verdict, place: Path, expected: dict[int, Images], options: Options, say: Say) -> None:
    """Raises CheckFailed where ONNX Runtime's images are not PyTorch's."""
    pipeline = ORTPipeline(place, provider=options.checking_provider, threads=options.threads, arena=False)
    try:
        found = {batch: draw(pipeline, batch, options.steps) for batch in expected}
    except BadInput as error:
        raise CheckFailed(f"the directory of ONNX files does not draw: {error}") from error
    check = compared(found, expected, options.steps, options.dtype)
    verdict.content["images"] = check.as_dict()
    verdict.images = {"PyTorch": expected[max(expected)], "ONNX Runtime": found[max(found)]}
    if not check.passed:
        raise CheckFailed(f"the pipeline does not draw what PyTorch does: {summary(check)}")
    say(f"the whole pipeline draws what PyTorch does: {summary(check)}")


def time_both(
    verdict: Verdict,
    model: Path,
    place: Path,
    options: Options,
    say: Say,
    show: Callable[[Latency], None],
) -> None:
    """The denoiser's latency and, of a pipeline that is drawn from, the whole's with each component's share.

    With --no-bench the proofs of a provider that is asked for.
    """
    content = verdict.content
    content["latency"] = "left out (--no-bench)"
    if not options.latency:
        if options.provider:
            prove_parts(place, options, content.setdefault("placements", {}))
            say(f"proved on {options.asked_provider}, each part whole: {', '.join(content['placements'])}")
        return
    unet = denoiser_file(place)
    provider, refused = provider_for(unet, options)
    content["providers_refused"] = refused
    if provider is None:
        content["latency"] = f"none: no provider computes {options.dtype} and is proved"
        say(f"latency {content['latency']}")
        if gated(options):
            raise HardwareUnproved(f"--min-speedup, --max-latency-ms: latency {content['latency']}: {refused}")
        return
    options = replace(options, timestep=timestep_of(unet), dynamic=open_in(unet))
    why, shares = not_timed(pipeline_class(place), read_index(place)), Shares()
    with dense_file(model, unet, options) as dense:
        alone = verdict.alone = time_files(unet, dense, options, provider=provider)
        if not why:
            verdict.latency, shares = measure_pipeline(place, dense, options, options.steps, without_replay(provider))
    say("the denoiser alone, one pass:")
    show(alone)
    content["latency"] = {"denoiser": alone.as_dict()}
    if verdict.latency is None:
        content["latency"]["pipeline"] = f"the whole pipeline is not timed: {why}"
        say(content["latency"]["pipeline"])
        return
    content["latency"] |= {
        "pipeline": verdict.latency.as_dict(),
        "steps": options.steps,
        "shares": {name: shares.of(name) for name in shares.seconds},
    }
    say(f"the whole pipeline, an image of {options.steps} steps:")
    show(verdict.latency)
    for line in lines(shares):
        say(line)
