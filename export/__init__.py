"""A pruned model as an ONNX file that is proved right and proved fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffprune_plugin.export.benchmark import measure
    from diffprune_plugin.export.convert import to_onnx
    from diffprune_plugin.export.integrity import check_files, read_provenance
    from diffprune_plugin.export.ort_pipeline import ORTPipeline
    from diffprune_plugin.export.ort_unet import ORTUNet
    from diffprune_plugin.export.proofs import best_provider, prove
    from diffprune_plugin.export.verify import verify_onnx

# Imported on first use: --help waits for neither torch nor ONNX Runtime, and the proofs need no torch at all.
_HOME = {
    "ORTPipeline": "ort_pipeline",
    "ORTUNet": "ort_unet",
    "best_provider": "proofs",
    "check_files": "integrity",
    "measure": "benchmark",
    "prove": "proofs",
    "read_provenance": "integrity",
    "to_onnx": "convert",
    "verify_onnx": "verify",
}

__all__ = [
    "ORTPipeline",
    "ORTUNet",
    "best_provider",
    "check_files",
    "measure",
    "prove",
    "read_provenance",
    "to_onnx",
    "verify_onnx",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
