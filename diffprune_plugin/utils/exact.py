"""Float32 as exact as it is, whatever the process computes its models in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch

Switch = tuple[Callable[[], Any], Callable[[Any], None], Any]  # reads it, sets it, what is exact


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside products and convolutions of float32; afterwards as the process had it.

    For regressions, whose weakest ridge is finer than products of ten bits, and for what is to be a reference.
    """
    with ExitStack() as stack:
        found = []
        for read, put, exact in switches():
            with suppress(RuntimeError):  # torch refuses to read an old switch beside a new one that says otherwise
                found.append((put, read(), exact))
        for put, was, _ in found:
            stack.callback(put, was)
        for put, _, exact in reversed(found):  # an old switch sets new ones too, here and on the way back
            put(exact)
        yield


def switches() -> list[Switch]:
    """Those that torch has from 2.9 on, and the old ones."""
    backends = torch.backends
    places = (backends.cuda, "matmul"), (backends.cudnn, "conv"), (backends.mkldnn, "matmul"), (backends.mkldnn, "conv")
    rows: list[tuple[Any, str, Any]] = [(getattr(*place, None), "fp32_precision", "ieee") for place in places]
    rows = [row for row in rows if hasattr(*row[:2])] + [(backends.cudnn, "allow_tf32", False)]
    found: list[Switch] = [
        (partial(getattr, row, name), partial(setattr, row, name), exact) for row, name, exact in rows
    ]
    return [*found, (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")]
