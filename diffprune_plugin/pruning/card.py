"""The model card of a saved pipeline: README.md with the hub's header, made from what lies in the directory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.planning.plan import PLAN_FILE, PruningPlan
from diffprune_plugin.planning.report import error_text, quantity
from diffprune_plugin.pruning.directory import (
    ADAPTER_FILE,
    COMPENSATION_FILE,
    CONFIG_FILE,
    DENSE_CONFIG,
    LOADER_FILE,
    SOURCE_KEY,
    read_json,
)
from diffprune_plugin.pruning.index import INDEX_FILE
from diffprune_plugin.utils.files import alone_in, renew_listed, sha256, write_text

CARD = "README.md"
BEGIN, END = "<!-- diffprune: renewed by 'diffprune card' from here -->", "<!-- diffprune: to here -->"
TAGS = ("diffprune-plugin", "pruning", "structural-pruning")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TASKS = {"prompt": "text-to-image", "": "unconditional-image-generation"}
SHORT = 12  # digits of a hash for people


def write_card(directory: Path, source: Path | str | None = None, *, proofs: Mapping[str, Any] | None = None) -> Path:
    """Write README.md into a directory that is being made.

    ``source``: the directory or hub name that it was made from, for its name and licence; ``proofs``: further parts of
    "Measured" by title. Raises BadInput for a source whose card cannot be read.
    """
    path = directory / CARD
    path.write_text(card_text(directory, source, dict(proofs or {})), encoding="utf-8")
    return path


def card_text(directory: Path, source: Path | str | None, proofs: dict[str, Any]) -> str:
    """The card of what lies in a directory; what people wrote around our part of an old one, and its header, stays."""
    old = read_card(directory / CARD)
    body = "\n".join(lines(directory, proofs)).rstrip() + "\n"
    text = body if old is None else around(old.text, body)
    return f"---\n{data(directory, source, old).to_yaml()}\n---\n\n{text}"


def renew_card(directory: Path, proofs: Mapping[str, Any] | None = None) -> Path:
    """Renew README.md of a directory that is there, whose list of files is told; proofs of other titles stay in it.

    Raises BadInput for a directory that is no pipeline, or a card that cannot be read.
    """
    if not (directory / INDEX_FILE).is_file():
        raise BadInput(f"{directory}: no {INDEX_FILE}; give a pipeline directory")
    with alone_in(directory):
        old = read_card(directory / CARD)
        kept = {} if old is None else proofs_in(old.text)
        write_text(directory / CARD, card_text(directory, None, kept | dict(proofs or {})))
        renew_listed(directory, CARD)
    return directory / CARD


def read_card(path: Path) -> ModelCard | None:
    if not path.exists():
        return None
    try:
        card: ModelCard = ModelCard.load(path)
        return card
    except Exception as error:  # of its YAML, in whichever library
        raise BadInput(f"{path}: its header cannot be read: {first_line(error)}; mend or remove it") from None


def proofs_in(text: str) -> dict[str, list[str]]:
    """The proofs in our part of a card, by title."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in text.partition(BEGIN)[2].partition(END)[0].splitlines():
        if line.startswith("  - ") and title:
            found.setdefault(title, []).append(line[4:])
        else:
            title = line[2:] if line.startswith("- ") else ""
    return found


def facts_of(card: ModelCard) -> dict[str, Any]:
    """A card's header."""
    found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    return found


def around(text: str, body: str) -> str:
    """The text with our part in it renewed, or behind it where it has none; raises BadInput for one without an end."""
    before, found, rest = text.strip().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if found and not ended:
        raise BadInput(f"{CARD}: its part that begins with {BEGIN} has no {END}; put that back, or take the part out")
    return "\n\n".join(part.strip() for part in (before, body, after) if part.strip()) + "\n"


def data(directory: Path, source: Path | str | None, old: ModelCard | None) -> ModelCardData:
    """The header: what an old one says stays, ours is added."""
    stated = {} if old is None else facts_of(old)
    based = origin(source)
    index = read_json(directory / INDEX_FILE)
    task = TASKS["prompt" if any(name.startswith(("tokenizer", "text_encoder")) for name in index) else ""]
    ours: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task} | based
    tags = list(dict.fromkeys([*stated.pop("tags", []), *TAGS, *(["onnx"] if onnx_files(directory) else [])]))
    return ModelCardData(**{**ours, **stated, "tags": tags})


def origin(source: Path | str | None) -> dict[str, str]:
    """Name on the hub, and licence, of what a model was made from, as far as it says so."""
    found: dict[str, str] = {}
    if source is None:
        return found
    card = None
    with contextlib.suppress(BadInput):  # somebody else's damaged card keeps no model from being saved
        card = read_card(Path(source) / CARD) if Path(source).is_dir() else None
    if card is not None:
        stated = facts_of(card)
        found |= {
            key: stated[key] for key in ("license", "license_name", "license_link", "base_model") if stated.get(key)
        }
    elif HUB_NAME.fullmatch(str(source)) and not Path(source).exists():
        found["base_model"] = str(source)
    return found


def lines(directory: Path, proofs: dict[str, Any]) -> Iterator[str]:
    """Our part of the card."""
    index = read_json(directory / INDEX_FILE)
    plan = plan_below(directory)
    yield from (BEGIN, "", f"# {index['_class_name']}" + (", pruned" if plan else ""), "")
    if plan is not None:
        yield from plan_lines(plan)
    yield from size_lines(directory)
    yield from ("", "## Measured", "")
    measured = list(measured_lines(directory, proofs))
    yield from measured or ["Nothing yet: `diffprune evaluate DIRECTORY --against DENSE --reference IMAGES` would."]
    yield from ("", "## Load it", "")
    yield from load_lines(directory, plan is not None)
    yield from ("", "## Limits", "")
    yield from limit_lines(directory, plan)
    yield from ("", END)


def plan_below(directory: Path) -> PruningPlan | None:
    """The plan of the pruned component in a pipeline directory, beside it where blocks alone went; None for a dense
    one."""
    found = [path for path in (directory / PLAN_FILE, *sorted(directory.glob(f"*/{PLAN_FILE}"))) if path.is_file()]
    return PruningPlan.read(found[0]) if found else None


def plan_lines(plan: PruningPlan) -> Iterator[str]:
    asked = ", ".join(f"{key} {value:g}" for key, value in plan.target.items()) or f"ratio {plan.pruning_ratio:g}"
    name = plan.criterion.get("name", "")
    options = ", ".join(f"{key} {value}" for key, value in plan.criterion.items() if key != "name" and plain(value))
    gone = ["channels are gone, none are zeros"] if plan.layers else []
    gone += [f"whole blocks are gone ({len(plan.depth)})"] if plan.depth else []
    yield from (f"Its {plan.model_class} was made smaller with diffprune-plugin: {'; '.join(gone)}.", "")
    whole = plan.blocks or plan.depth == ()
    rows = {
        "": ("dense" if whole else "dense, without those blocks", "pruned", "left"),
        "---": ("---", "---", "---"),
        "parameters": compared(plan.blocks.params if plan.blocks else plan.params[0], plan.params[1]),
        "MACs of a pass": compared(plan.blocks.macs if plan.blocks else plan.macs[0], plan.macs[1]),
    }
    yield from (f"| {' | '.join((title, *cells))} |" for title, cells in rows.items())
    yield from ("", "| the plan | |", "| --- | --- |")
    facts = {"asked": asked, "criterion": name + (f" ({options})" if options else "")}
    facts |= {"layers changed": len(plan.layers), "coupled groups cut": sum(bool(g.removed) for g in plan.groups)}
    facts |= {"groups of them short of what was asked": len(plan.shortfalls())}
    facts |= {"blocks gone": ", ".join(plan.depth)} if plan.depth else {}
    facts |= {"attentions that lost whole heads": len(plan.heads)} if plan.heads else {}
    yield from (f"| {key} | {value} |" for key, value in (facts | {"plan (SHA-256)": plan.sha256[:SHORT]}).items())
    yield ""


def compared(before: int, after: int) -> tuple[str, str, str]:
    return quantity(before), quantity(after), f"{after / before:.1%}"


def plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def size_lines(directory: Path) -> Iterator[str]:
    """Bytes of the components, and the hashes that they can be known by."""
    yield from ("## Files", "", "| file | MB | SHA-256 |", "| --- | --- | --- |")
    for path in sorted(directory.rglob("*")):
        if path.suffix in (".safetensors", ".onnx", ".data") or path.name == LOADER_FILE:
            name = path.relative_to(directory).as_posix()
            yield f"| {name} | {path.stat().st_size / 1e6:.1f} | {sha256(path)} |"


def measured_lines(directory: Path, proofs: dict[str, Any]) -> Iterator[str]:
    if (directory / CONFIG_FILE).is_file():
        yield f"- pruned by `diffprune prune {CONFIG_FILE}`, with the config in this directory"
    if (directory / COMPENSATION_FILE).is_file():
        repairs = read_json(directory / COMPENSATION_FILE).get("repairs", [])
        taken = sum(bool(repair.get("refitted")) for repair in repairs)
        yield f"- compensated without training: {taken} of {len(repairs)} regressions were taken ({COMPENSATION_FILE})"
    if (directory / "finetune.json").is_file():
        beside = (directory / ADAPTER_FILE).is_file()
        how = f"as an adapter, which `pipeline.load_lora_weights` takes from {ADAPTER_FILE}: " if beside else ""
        yield f"- fine-tuned: {how}the loss curve is in finetune.json"
    for title, part in proofs.items():
        yield from (f"- {title}", *(f"  - {line}" for line in part))


def load_lines(directory: Path, pruned: bool) -> Iterator[str]:
    if onnx_files(directory):
        yield from ("```python", "from diffprune_plugin.export import ORTPipeline", "")
        yield from ('pipeline = ORTPipeline("DIRECTORY")  # or optimum-onnx\'s ORTDiffusionPipeline', "```")
        return
    yield from ("```python", "from diffusers import DiffusionPipeline", "")
    if pruned and any(directory.glob(f"*/{LOADER_FILE}")):
        yield "import diffprune_plugin  # where it is installed; without it pass trust_remote_code=True"
    elif pruned and not any(directory.glob(f"*/{DENSE_CONFIG}")) and not (directory / PLAN_FILE).is_file():
        yield "import diffprune_plugin"
    yield from ('pipeline = DiffusionPipeline.from_pretrained("DIRECTORY")', "```")


def limit_lines(directory: Path, plan: PruningPlan | None) -> Iterator[str]:
    yield "- It can do no more than the model that it was made from, whose own limits and terms hold for it too."
    if plan is not None:
        yield "- Its images differ from the dense model's; how much is what was measured above, or was not."
    for path in sorted(directory.glob(f"*/{LOADER_FILE}")):
        name = path.relative_to(directory).as_posix()
        yield f"- `trust_remote_code=True` runs {name}: read it first, it is short and the same in every such model."


def onnx_files(directory: Path) -> bool:
    return any(directory.glob("*/*.onnx"))


def verdict_lines(verdict: Mapping[str, Any]) -> list[str]:
    """What an export's verdict says, in lines for a card."""
    found = [f"`{verdict['command']}`"] if "command" in verdict else []
    found += ["it held" if verdict.get("passed") else f"it did NOT hold: {verdict.get('failure')}"]
    parts = verdict.get("parts") or {"the file": verdict}
    for name, part in parts.items():
        numerics = part.get("verify")
        if isinstance(numerics, Mapping):
            worst = numerics["worst"]
            count, relative = len(numerics["cases"]), error_text(worst["relative"])
            found.append(f"{name}: {count} cases against PyTorch, worst relative {relative}")
        elif numerics:
            found.append(f"{name}: {numerics}")
    images = verdict.get("images")
    if isinstance(images, Mapping):
        difference = error_text(images["difference"])
        found.append(f"images: largest difference of a pixel {difference}, allowed {images['tolerance']:.1e}")
    elif images:
        found.append(f"images: {images}")
    latency = verdict.get("latency")
    for what, each in latency_parts(latency):
        for ratio in each["ratios"]:
            between = f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
            where = f"{what}, {each['provider']}, batch {ratio['batch']}"
            found.append(f"{where}: {ratio['name']} {ratio['median']:.2f}x {between}")
    if isinstance(latency, Mapping) and isinstance(latency.get("pipeline"), str):
        found.append(latency["pipeline"])
    return found


def latency_parts(latency: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(latency, Mapping) and "pipeline" in latency:
        yield "the denoiser alone", latency["denoiser"]
        if isinstance(latency["pipeline"], Mapping):
            yield f"an image of {latency['steps']} steps", latency["pipeline"]
    elif isinstance(latency, Mapping):
        yield "latency", latency


def evaluation_lines(facts: Mapping[str, Any]) -> list[str]:
    """What `diffprune evaluate` measured, in lines for a card."""
    named = {f"{role} ({values.get('name')})": values for role, values in facts["models"].items()}
    found = {**named, "compared, from the same noise": facts.get("compared", {})}
    lines = {name: ", ".join(numbers(values)) for name, values in found.items()}
    return [f"{name}: {line}" for name, line in lines.items() if line] or ["nothing but sizes was measured"]


def numbers(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        number = value.get("mean") if isinstance(value, Mapping) else value
        if isinstance(number, float):
            yield f"{key} {number:.4g}"


def source_of(model: Any) -> str | None:
    """Where a live pipeline or model was loaded from."""
    stated = getattr(model, "config", {}).get(SOURCE_KEY)
    return str(stated) if stated else None
