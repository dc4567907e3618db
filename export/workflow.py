"""Export, verification, placement and latency in one go, with a verdict that is written down whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput, CheckFailed, HardwareUnproved
from diffprune_plugin.export.baseline import allowed, check_baseline, dense_file
from diffprune_plugin.export.benchmark import DENSE, PRUNED, Latency, check_gates, gate, measure
from diffprune_plugin.export.convert import check_options, dense_twin, model_in, to_onnx
from diffprune_plugin.export.feeds import example_feeds, fixed_dims, multiples
from diffprune_plugin.export.halves import with_kept_layers
from diffprune_plugin.export.integrity import VERDICT, check_output, reject
from diffprune_plugin.export.kernels import TABLES, looked_up, unknown_line
from diffprune_plugin.export.options import BenchOptions, Options
from diffprune_plugin.export.promise import promise_line, promised
from diffprune_plugin.export.proofs import best_provider, check_device, prove
from diffprune_plugin.export.providers import check_distribution, known_provider, without_replay
from diffprune_plugin.export.report import write_page
from diffprune_plugin.export.scheduler import ddim_of, pipeline_scheduler
from diffprune_plugin.export.tuning import Tried, as_rows, best, check_tune, tune
from diffprune_plugin.export.verdict import Verdict, command, outcome, told, write_verdict
from diffprune_plugin.export.verify import summary, verify_onnx
from diffprune_plugin.planning.plan import PLAN_FILE, PruningPlan
from diffprune_plugin.pruning.directory import model_folder

DEFAULT_MODELS = ("pruned", "diffprune-demo/pruned")


def default_model() -> Path:
    """The pruned model that was written last, at the default places of ``diffprune prune`` and ``diffprune demo``.

    Raises BadInput if there is none.
    """
    found = [path for name in DEFAULT_MODELS if (path := Path(name)).is_dir()]
    if not found:
        raise BadInput(f"no --model given and no {' or '.join(DEFAULT_MODELS)} here; give --model DIR")
    return max(found, key=lambda path: path.stat().st_mtime)


def run(
    model: Path,
    output: Path,
    options: Options,
    say: Callable[[str], None] = lambda line: None,
    show: Callable[[Latency], None] = lambda latency: None,
) -> Verdict:
    """Export a model and prove the file: numerics, placement, latency; the verdict lies beside it as JSON.

    ``say`` gets a line after each part, ``show`` the latency before the gates judge it.

    Raises BadInput, CheckFailed or HardwareUnproved; a verdict with that failure is written before, if a file was.
    """
    check_before(model, output, options)
    verdict = Verdict({"passed": False, "model": told(model), "file": told(output)})
    verdict.content["command"] = command(model, output, options)
    path = options.verdict or output.with_name(output.name + VERDICT)
    try:
        with outcome(verdict.content, [model, output, options.baseline]):
            options = with_kept_layers(model, options, say)
            to_file(verdict, model, output, options, say)
            for old in filter(None, (options.verdict, options.report)):  # of a file that this one has replaced
                old.unlink(missing_ok=True)
            verdict.content["failure"] = "interrupted before all of it was proved"
            write_verdict(path, output, verdict.content)
            prove_all(verdict, model, output, options, say)
            if verdict.latency:
                show(verdict.latency)
                gate(verdict.latency, options.max_latency_ms, options.min_speedup)
    finally:
        if "export" in verdict.content:
            write_verdict(path, output, verdict.content)
            write_page(options.report, verdict)
    return verdict


def check_before(model: Path, output: Path, options: Options) -> None:
    """Everything that can be refused before minutes of work: paths, options, a provider that is not there."""
    check_output(output, options.overwrite)
    check_asked(model, options)


def check_asked(model: Path, options: Options) -> None:
    """The same for all but the output."""
    check_gates(options.max_latency_ms, options.min_speedup)
    if options.verify and (scheduler := pipeline_scheduler(model)) is not None:
        ddim_of(scheduler, options.steps)
    check_options(options.opset, options.dtype, options.keep_fp32)
    options.of_file()
    if options.check_placement and options.check_placement not in TABLES:
        raise BadInput(f"--check-placement {options.check_placement}: there is a table for {', '.join(TABLES)} only")
    check_timed(options)
    if "batch" not in options.dynamic and options.batches != (1,):
        raise BadInput(f"--batch {options.batches}: the batch is fixed to 1; give --dynamic batch")
    if options.tune:
        check_tune(options.asked_provider)
    if options.latency or options.verify:
        check_distribution()
    if asked := options.asked_provider:
        check_device(asked, options.dtype)
    check_baseline(model, options)


def check_timed(options: Options) -> None:
    """Raises BadInput for what is made of the latency where that is left out."""
    asked = {
        "--min-speedup": options.min_speedup is not None,
        "--max-latency-ms": options.max_latency_ms is not None,
        "--tune": options.tune,
        "--torch": options.torch,
        "--markdown": options.markdown is not None,
        "--plot": options.plot is not None,
    }
    if not options.latency and (named := [flag for flag, given in asked.items() if given]):
        raise BadInput(f"{', '.join(named)}: made of the latency that --no-bench leaves out; give one or the other")


def to_file(verdict: Verdict, model: Path, output: Path, options: Options, say: Callable[[str], None]) -> None:
    """The export itself, which nothing is proved of yet."""
    report = to_onnx(
        model,
        output,
        overwrite=options.overwrite,
        **options.of_file(),
    )
    verdict.content["export"] = asdict(report) | {"path": told(report.path)}
    size = sum(file["bytes"] for file in report.files.values())
    say(f"exported {output}: {size / 1e6:.1f} MB, {report.nodes} nodes, {report.seconds:.0f} s")
    for word, step in multiples(report.provenance).items():
        if step > 1:
            say(f"{word}: multiples of {step}, as in PyTorch")


def prove_all(verdict: Verdict, model: Path, output: Path, options: Options, say: Callable[[str], None]) -> None:
    """Each part in turn; what it found goes into the verdict at once."""
    content = verdict.content
    provider, refused = provider_for(output, options)
    content["providers_refused"] = refused
    content["verify"] = "left out (--no-verify)"
    if options.verify:
        verify(content, model, output, options, provider or "cpu", say)
    else:
        say("NOT verified (--no-verify)")
    if options.provider and not options.latency:  # else the latency is proved, session by session
        dims = fixed_dims(output, batch=options.batches[0])
        placement = prove(output, options.asked_provider or "", example_feeds(output, dims), dims, options.threads)[0]
        content["placement"] = placement.as_dict()
    if options.check_placement:
        check_placement(content, output, options.check_placement, options.batches[0], say)
    content["latency"] = "left out (--no-bench)"
    if options.latency and provider:
        verdict.latency = time_it(model, output, options, provider)
        content["latency"] = verdict.latency.as_dict()
    elif options.latency:
        content["latency"] = f"none: no provider computes {options.dtype} and is proved"
        if gated(options):
            raise HardwareUnproved(f"--min-speedup, --max-latency-ms: latency {content['latency']}: {refused}")
    if not verdict.latency:
        say(f"latency {content['latency']}")
    if promise := promised(plan_in(model), verdict.latency):
        content["promise"] = promise
        say(promise_line(promise))


def plan_in(model: Path) -> PruningPlan | None:
    """The plan in a pipeline or model directory, if it is a pruned one's."""
    found = model_folder(model) / PLAN_FILE
    return PruningPlan.read(found) if found.exists() else None


def gated(options: Options) -> bool:
    return options.min_speedup is not None or options.max_latency_ms is not None


def check_placement(
    content: dict[str, Any], output: Path, provider: str, batch: int, say: Callable[[str], None]
) -> None:
    misses, unknown = looked_up(output, provider, batch=batch)
    content["placement_check"] = [asdict(miss) for miss in misses]
    say(f"{provider}: {len(misses)} nodes without a kernel, by ONNX Runtime's documented table")
    for miss in misses:
        say(f"  {miss.operator} {miss.node}: {miss.why}")
    if unknown:
        content["placement_unknown"] = unknown
        say(unknown_line(unknown))


def time_it(model: Path, output: Path, options: Options, provider: str) -> Latency:
    """The file against the dense model's, and against PyTorch if asked."""
    with dense_file(model, output, options) as dense:
        eager = eager_models(model, options, provider) if options.torch else None
        return time_files(output, dense, options, eager, provider)


def time_files(
    pruned: Path,
    dense: Path | None,
    options: BenchOptions,
    eager: Mapping[str, Any] | None = None,
    provider: str | None = None,
) -> Latency:
    """The latency of one ONNX file, or of two against each other, as the options have it; ``provider``: instead of
    theirs."""
    provider, of_dense, tried = provider or options.asked_provider, None, list[Tried]()
    if options.tune:
        tried = tune(pruned, dense, check_tune(provider), options.batches[0], options.threads)
        provider, of_dense = best(tried, PRUNED), best(tried, DENSE)
    result = measure(
        pruned,
        dense,
        provider=provider,
        dense_provider=of_dense,
        batches=options.batches,
        threads=options.threads,
        rounds=options.rounds,
        budget=options.budget,
        eager=eager,
    )
    result.tuned = as_rows(tried)
    return result


def provider_for(output: Path, options: Options) -> tuple[str | None, dict[str, str]]:
    """The provider asked for, else the best that is proved, with why the better ones are not; None if none is."""
    if options.provider or not options.latency:
        return options.asked_provider, {}
    dims = fixed_dims(output, batch=options.batches[0])
    try:
        placement = best_provider(output, example_feeds(output, dims), dims, options.dtype)
    except HardwareUnproved as error:
        return None, {"all": str(error)}
    return placement.provider, placement.refused


def verify(
    content: dict[str, Any], model: Path, output: Path, options: Options, provider: str, say: Callable[[str], None]
) -> None:
    """Raises CheckFailed, the files renamed, if the numerics miss."""
    try:
        tolerance, of_dense = allowed(model, output, options, without_replay(provider))
    except CheckFailed as error:
        reject(output, content["export"]["files"])
        raise CheckFailed(f"{error}; renamed *.rejected") from None
    result = verify_onnx(
        output,
        model,
        scheduler=pipeline_scheduler(model),
        steps=options.steps,
        provider=without_replay(provider),
        threads=options.threads,
        tolerance=tolerance,
        files=content["export"]["files"],
    )
    result.dense = of_dense
    content["verify"] = result.as_dict()
    if options.dtype not in known_provider(provider).dtypes:
        content["verify"]["note"] = (
            f"{provider} computes {options.dtype} models in fp32: graph and weights are checked, not the type itself"
        )
    if not result.passed:
        raise CheckFailed(f"{output} does not compute what {model} does: {summary(result)}; renamed *.rejected")
    say(f"verified against PyTorch on {provider}: {summary(result)}")


def eager_models(model: Path, options: Options, provider: str) -> dict[str, Any]:
    """The PyTorch models to time beside, on the same kind of device; raises BadInput where PyTorch has none."""
    import torch

    device = known_provider(provider).memory
    if known_provider(provider).is_gpu and not torch.cuda.is_available():
        raise BadInput(
            "--torch: this PyTorch has no CUDA, and a CPU's figure does not belong beside a GPU's; leave it out"
        )
    pruned = model_in(model, options.dtype)
    dense = model_in(options.baseline, options.dtype) if options.baseline else dense_twin(pruned)
    models = {"pruned": pruned} | ({"dense": model_in(dense, options.dtype)} if dense is not None else {})
    return {name: each.to(device) for name, each in models.items()}
