"""Whether the ONNX file of a part of a pipeline computes what PyTorch does: every batch, axis and output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from diffprune_plugin.export.components import Piece, Tensors
from diffprune_plugin.export.convert import IMAGE
from diffprune_plugin.export.feeds import input_shapes
from diffprune_plugin.export.integrity import check_files
from diffprune_plugin.export.ort_session import OrtSession, RunFailed
from diffprune_plugin.export.verify import BATCHES, Case, Tolerance, Verification, failed, judged, tolerance_of

IMAGE_BATCHES = (1, 2)  # of autoencoders, whose images are large


def verify_part(path: Path, piece: Piece, *, provider: str = "cpu", threads: int = 1) -> Verification:
    """Compare every output of a part's file with PyTorch's; raises BadInput for a damaged file."""
    dtype = check_files(path)["dtype"]
    result = Verification(provider, dtype, tolerance_of(provider, dtype))
    session = OrtSession(path, provider, threads)
    if missing := sorted(set(piece.names) ^ set(session.names) | set(piece.example()) ^ set(session.types)):
        result.cases.append(failed(f"{', '.join(missing)} only in the graph or only in the model"))
        return result
    for name, inputs in part_cases(piece, path):
        result.cases += compared(name, session, piece, inputs, result.tolerance)
    if result.passed:
        result.cases += dependence(session, piece, result.tolerance)
    return result


def part_cases(piece: Piece, path: Path) -> Iterator[tuple[str, Tensors]]:
    """Every batch; tokens that end early; every other dynamic axis one step longer and at half its length."""
    dynamic = {axis for shape in input_shapes(path).values() for axis in shape if isinstance(axis, str)}
    images = any(word in IMAGE for word in piece.sizes)
    for batch in IMAGE_BATCHES if images else BATCHES:
        if batch == 1 or "batch" in dynamic:
            yield f"batch {batch}", piece.example(batch, batch=batch)
    if "input_ids" in piece.example():
        yield "tokens that end early", ended(piece, 2 if "batch" in dynamic else 1)
    for word in sorted(dynamic - {"batch"}):
        step, now = (piece.part.scale(piece.model), piece.sizes[word]) if images else (1, piece.sizes[word])
        for size in (now + step, max(step, now // 2 // step * step)) if images else (now // 2,):
            yield f"{word} {size}", piece.example(**{word: size})


def ended(piece: Piece, batch: int) -> Tensors:
    """Tokens with the end of the text at another place in each row: what is pooled is read there."""
    inputs, config = piece.example(3, batch=batch), piece.model.config
    stated = getattr(config, "eos_token_id", None)
    end = stated if isinstance(stated, int) and 2 < stated < config.vocab_size else config.vocab_size - 1
    for row in range(batch):
        inputs["input_ids"][row, 5 + 3 * row :] = end
    return inputs


def compared(name: str, session: OrtSession, piece: Piece, inputs: Tensors, tolerance: Tolerance) -> Iterator[Case]:
    expected = piece.answers(inputs)
    try:
        found = session(inputs)
    except RunFailed as error:
        yield failed(f"{name}: {error}")
        return
    for output, value in expected.items():
        if found[output].shape != value.shape:
            yield failed(f"{output}, {name}: shape {tuple(found[output].shape)}, not {tuple(value.shape)}")
        else:
            yield judged(f"{output}, {name}", found[output], value.float(), tolerance)


def dependence(session: OrtSession, piece: Piece, tolerance: Tolerance) -> Iterator[Case]:
    """Whether the file's first output changes with each input that PyTorch's changes with."""
    inputs, others = piece.example(), piece.example(seed=1)
    first = piece.names[0]
    found, expected = session(inputs)[first], piece.answers(inputs)[first]
    for name in inputs:
        if torch.equal(others[name], inputs[name]):
            others[name] = 1 - inputs[name]  # a mask of ones
        changed = inputs | {name: others[name]}
        moved = float((session(changed)[first] - found).abs().max())
        meant = float((piece.answers(changed)[first] - expected).abs().max())
        held = moved > meant / 2 or meant <= tolerance.absolute + tolerance.relative * float(expected.abs().max())
        yield Case(f"output depends on {name}", 0.0 if held else meant, 0.0, held)
