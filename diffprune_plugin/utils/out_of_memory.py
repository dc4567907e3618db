"""Whether memory ran out, by what any library says; torch is not imported, for proofs run where there is none."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from diffprune_plugin.errors import BadInput

# As torch, its devices, ONNX Runtime and C++ say it.
MEMORY = re.compile(
    r"allocate memory|failed to allocate|not enough memory|out of memory|bad.?alloc"
    r"|CUDNN_STATUS_NOT_SUPPORTED|DEVMEM Allocation failed"
    r"|unable to find an engine to execute|_STATUS_ALLOC_FAILED|ERROR_OUT_OF_MEMORY",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> bool:
    """Whether another library's error says that memory ran out, on whatever device; nothing is imported for it."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or bool(MEMORY.search(str(error)))


@contextlib.contextmanager
def within_memory(told: str) -> Iterator[None]:
    """Raises BadInput, with when and what helps, where memory does not suffice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise BadInput(f"out of memory {told}") from None
