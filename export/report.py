"""What an export found, for people: one HTML file, which ``--report`` asks for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffprune_plugin.export import tables
from diffprune_plugin.export.benchmark import Latency
from diffprune_plugin.export.drawing import ImageCheck, summary
from diffprune_plugin.export.kernels import unknown_line
from diffprune_plugin.export.promise import promise_line
from diffprune_plugin.export.verdict import Verdict
from diffprune_plugin.planning.report import error_text, quantity
from diffprune_plugin.utils.html_report import markdown_of, write_report
from diffprune_plugin.utils.images import image_grid, pil_images, save_image
from diffprune_plugin.utils.optional import has

FILES = ("", "class", "type", "parameters", "MACs of a pass", "MB", "nodes", "opset")
NUMERICS = ("", "compared on", "cases", "largest error", "relative", "allowed", "")
Content = Mapping[str, Any]


def write_page(path: Path | None, verdict: Verdict) -> None:
    """Write a verdict to a file, whatever ended the export; nothing where no file is asked for."""
    if path is None:
        return
    content = verdict.content
    title = f"{content.get('file') or content['directory']}: {'passed' if content['passed'] else 'FAILED'}"
    with tempfile.TemporaryDirectory() as folder:
        write_report(path, title, "\n\n".join([f"# {title}", *sections(verdict, Path(folder))]), Path(folder))


def sections(verdict: Verdict, folder: Path) -> Iterator[str]:
    """The Markdown; its pictures go into ``folder``."""
    content = verdict.content
    if "failure" in content:
        yield f"**{content['failure']}**"
    yield f"```\n{content['command']}\n```"
    parts = content.get("parts") or ({content["file"]: content} if "export" in content else {})
    if parts:
        yield tables.pipes(FILES, (file_cells(name, part["export"]) for name, part in parts.items()))
        yield "## Against PyTorch"
        yield from numerics({name: part.get("verify", "left out") for name, part in parts.items()})
    if "images" in content:
        yield from images(verdict, folder)
    yield from latency(verdict, folder)
    if "promise" in content:
        yield promise_line(content["promise"])
    yield from proofs(verdict)
    if refused := content.get("providers_refused"):
        yield "## Better providers that are not proved here"
        yield "\n".join(f"- {why}" for why in refused.values())
    if "placement_check" in content:
        misses = [f"- {miss['operator']} {miss['node']}: {miss['why']}" for miss in content["placement_check"]]
        yield f"## Nodes without a kernel, by ONNX Runtime's documented table: {len(misses)}"
        yield "\n".join(misses)
        if unknown := content.get("placement_unknown"):
            yield unknown_line(unknown)


def file_cells(name: str, export: Content) -> tuple[str, ...]:
    """What a file holds, beside what the dense model had where the file says so."""
    facts = export["provenance"]
    sizes = (
        quantity(int(facts[key])) + (f" of {quantity(int(facts[f'dense_{key}']))}" if f"dense_{key}" in facts else "")
        for key in ("params", "macs")
    )
    size = sum(file["bytes"] for file in export["files"].values()) / 1e6
    return (name, facts["model_class"], facts["dtype"], *sizes, f"{size:.1f}", str(export["nodes"]), facts["opset"])


def numerics(found: Mapping[str, Any]) -> Iterator[str]:
    """The largest error of each file, then every case, folded away."""
    compared = {name: verify for name, verify in found.items() if not isinstance(verify, str)}
    yield from (f"{name}: {why}" for name, why in found.items() if name not in compared)
    if compared:
        yield tables.pipes(NUMERICS, (numeric_cells(name, verify) for name, verify in compared.items()))
    for name, verify in compared.items():
        rows = ((case["name"], *errors(case), held(case["passed"])) for case in verify["cases"])
        yield folded(f"{name}: every case", tables.pipes(("case", "error", "relative", ""), rows))
        if verify["sampling"]:
            last, steps = error_text(verify["sampling"][-1]), len(verify["sampling"])
            yield f"{name}: {steps} DDIM steps of its own end {last} from PyTorch's (not judged)."


def numeric_cells(name: str, verify: Content) -> tuple[str, ...]:
    allowed = f"{verify['tolerance']['absolute']:.0e} + {verify['tolerance']['relative']:.0e} relative"
    cases = str(len(verify["cases"]))
    return (name, verify["provider"], cases, *errors(verify["worst"]), allowed, held(verify["passed"]))


def errors(case: Content) -> tuple[str, str]:
    return error_text(case["absolute"]), error_text(case["relative"])


def held(passed: bool) -> str:
    return "holds" if passed else "**missed**"


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def images(verdict: Verdict, folder: Path) -> Iterator[str]:
    """How far a pipeline's images are apart, and what they look like."""
    yield "## Images from the same noise"
    found = verdict.content["images"]
    if isinstance(found, str):
        yield found or "Not compared."
        return
    yield f"{summary(ImageCheck(**found))}: {held(found['passed'])}."
    # What is not finite has no colour; that it is none is said above.
    rows = {name: pil_images(np.nan_to_num(pixels, posinf=1, neginf=0)) for name, pixels in verdict.images.items()}
    width = next(iter(rows.values()))[0].width
    save_image(image_grid(rows, scale=max(1, 128 // width)), folder / "images.png")
    yield "![images of PyTorch and ONNX Runtime](images.png)"


def latency(verdict: Verdict, folder: Path) -> Iterator[str]:
    """One pass of the denoiser and, of a pipeline, an image with each component's share."""
    told = verdict.content.get("latency", {})
    if isinstance(told, str):
        yield f"## Latency\n\n{told}"
        return
    if alone := verdict.alone or verdict.latency:
        yield from latency_lines("One pass of the denoiser", alone, folder)
    if verdict.alone and verdict.latency:
        yield from latency_lines(f"An image of {told['steps']} steps", verdict.latency, folder)
        yield shares_table(told["shares"])
    elif isinstance(told.get("pipeline"), str):
        yield told["pipeline"]


def latency_lines(title: str, result: Latency, folder: Path) -> Iterator[str]:
    yield f"## {title}"
    if has("matplotlib"):
        picture = folder / f"{len(list(folder.iterdir()))}.png"
        tables.plot(result, picture)
        yield f"![{title}]({picture.name})"
    yield tables.markdown(result)
    if result.tuned:
        yield markdown_of(tables.tuned_table(result))


def shares_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Each component's share of an image, a column a model."""
    names = list(dict.fromkeys(name for found in shares.values() for name in found))
    rows = ((name, *(f"{found.get(name, 0.0):.1%}" for found in shares.values())) for name in names)
    return tables.pipes(("share of the image", *shares), rows)


def proofs(verdict: Verdict) -> Iterator[str]:
    """Session by session whether the provider is proved; what each proof saw is folded away."""
    measured = [result for result in (verdict.alone, verdict.latency) if result]
    found = [(name, placement.as_dict()) for result in measured for name, placement in result.placements.items()]
    found += verdict.content.get("placements", {}).items()
    found += [("the file", verdict.content["placement"])] if "placement" in verdict.content else []
    if not found:
        return
    yield "## Proofs of the provider, session by session"
    rows = ((name, p["provider"], f"{p['build_seconds']:.1f}", held(p["proved"])) for name, p in found)
    yield tables.pipes(("session", "provider", "built in s", "all five"), rows)
    for name, placement in found:
        seen = ((proof["name"], proof["seen"], held(proof["held"])) for proof in placement["proofs"])
        yield folded(f"{name}: what was seen", tables.pipes(("proof", "seen", ""), seen))
