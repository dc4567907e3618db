"""A stand-in for a GPU: tensors that say they are on ``cuda``, are computed on the CPU, and do not mix with its own.

What a GPU refuses is refused: tensors of two devices in one operation, numpy() of what is there, a generator of the
CPU for what is drawn there. What it computes in other bits is not seen, nor what only a real one does (memory, speed).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._dynamo  # it looks through torch.cuda when it is first needed
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

ATEN = torch.ops.aten
GPU = torch.device("cuda:0")
CPU = torch.device("cpu")
META = torch.device("meta")
IS = {"meta": GPU}  # what torch itself takes the tensors below for; elsewhere it is meta that is meant
# Between devices by what they are for; of an index the places may lie on the CPU.
CROSSING = (ATEN.copy_.default, ATEN._to_copy.default, ATEN._foreach_copy_.default)
INDEXING = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._unsafe_index.Tensor)


class There(torch.Tensor):
    """A tensor of the GPU, which holds the CPU's that it is computed with as ``inner``."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=META,  # autograd asks a real GPU for its streams
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def inner(value: There) -> torch.Tensor:
    return value.inner


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, on the device where a GPU would leave it."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = [value for value in tensors if isinstance(value, There)]
    asked = kwargs.get("device")
    place = torch.device(asked) if asked is not None else GPU if there else CPU
    place = IS["meta"] if place == META else place
    if func is ATEN.copy_.default or func is ATEN._foreach_copy_.default:
        place = args[0].device if isinstance(args[0], torch.Tensor) else args[0][0].device
    elif func not in CROSSING:
        check_together(func, args, tensors, there)
    if func is ATEN._fused_sdp_choice.default and there:
        return 0  # by plain matrix products: the CPU's fused kernel has another name
    given = {**kwargs, "device": CPU} if asked is not None and place.type == "cuda" else kwargs
    result = func(*tree_map_only(There, inner, args), **tree_map_only(There, inner, given))
    if place.type != "cuda":
        return result
    known = {id(value.inner): value for value in there}
    wrapped = tree_map_only(
        torch.Tensor, lambda value: known[id(value)] if id(value) in known else There(value), result
    )
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there and func not in CROSSING else wrapped


def check_together(func: Any, args: Any, tensors: list[torch.Tensor], there: list[There]) -> None:
    """Raises RuntimeError as torch does where devices are mixed; numbers, of no dimension, may lie on the CPU."""
    if func in INDEXING and isinstance(args[0], There):
        tensors = [args[0], *(value for value in args[2:3] if isinstance(value, torch.Tensor))]
    assert not (there and any(value.device.type == "meta" for value in tensors)), (
        f"made out of sight: {func} {[(type(v), v.device, v.shape) for v in tensors]}"
    )
    strangers = [value for value in tensors if not isinstance(value, There) and value.dim()]
    if there and strangers:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {func}")


class Everywhere(TorchDispatchMode):
    """Also what is made there out of nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        generator = given.get("generator")
        if isinstance(generator, torch.Generator) and torch.device(given.get("device") or CPU).type == "cuda":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")
        return computed(func, args, given)


class Numbered(TorchFunctionMode):
    """What torch does before its operations can be watched: ``cuda`` is the first of its kind, and so on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, given = tree_map_only((str, torch.device), numbered, (args, dict(kwargs or {})))
        if any(
            str(value) == "meta" for value in tree_flatten((args, given))[0] if isinstance(value, (str, torch.device))
        ):
            with mock.patch.dict(IS, {"meta": META}):
                return func(*args, **given)
        if func in TRANSLATED:
            return TRANSLATED[func](*args, **given)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], There):
            args = (args[0], *placed(*args))
        return func(*args, **given)


def numbered(value: Any) -> Any:
    return GPU if value in ("cuda", torch.device("cuda")) else value


def to(tensor: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
    """Tensor.to: what is there already stays the same tensor, and another one's device is what that says."""
    like = next((value for value in (*args, *given.values()) if isinstance(value, torch.Tensor)), None)
    dtype = like.dtype if like is not None else given.get("dtype")
    place = like.device if like is not None else given.get("device")
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device, int)) and not isinstance(value, bool):
            place = torch.device(value)
    place, dtype = torch.device(place or tensor.device), dtype or tensor.dtype
    rest = {key: given[key] for key in ("non_blocking", "copy", "memory_format") if key in given}
    if place == tensor.device:
        return torch.Tensor.to(tensor, dtype, **rest)
    return torch.Tensor.to(tensor, place, dtype, **rest)


def made(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> torch.Tensor:
    """torch.tensor."""
    return to(torch.tensor(data, dtype=dtype), device or CPU).requires_grad_(requires_grad)


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        return to(data, device or data.device, dtype or data.dtype)
    return to(torch.as_tensor(data, dtype=dtype), device or CPU)


def placed(tensor: There, index: Any, *values: Any) -> tuple[Any, ...]:
    """Places, which may lie on the CPU, and a number to be put there, both on the GPU."""
    index = tree_map_only(
        (list, np.ndarray, torch.Tensor), lambda some: as_tensor(some, device=GPU), index, is_leaf=is_list
    )
    tensors = [as_tensor(v) if isinstance(v, torch.Tensor) else made(v, dtype=tensor.dtype) for v in values]
    return (index, *(value if value.dim() else to(value, GPU) for value in tensors))


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """What ``tensor.data = value`` does."""
    torch.Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
    if isinstance(tensor, There):
        assert isinstance(value, There), "one of the CPU would take the place of one of the GPU"
        tensor.inner = value.inner


TRANSLATED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: to,
    torch.Tensor.type_as: to,
    torch.Tensor.cuda: lambda tensor, *_, **__: to(tensor, GPU),
    torch.Tensor.tolist: lambda tensor: torch.Tensor.tolist(to(tensor, CPU)),
    torch.Tensor.new_tensor: lambda tensor, data, **given: made(data, **{"device": tensor.device, **given}),
    torch.Tensor.data.__set__: set_data,  # type: ignore[attr-defined]
    torch.tensor: made,
    torch.as_tensor: as_tensor,
}


def nothing(*_: Any, **__: Any) -> None:
    pass


STAND_INS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "mem_get_info": lambda *_: (2**36, 2**36),
    "is_bf16_supported": lambda *_, **__: True,
    "get_rng_state": lambda *_: torch.get_rng_state(),
    **dict.fromkeys(
        ("_lazy_init", "set_device", "empty_cache", "synchronize", "set_rng_state", "manual_seed_all"), nothing
    ),
}


@contextlib.contextmanager
def a_gpu() -> Iterator[None]:
    """Inside it torch has a GPU."""
    with contextlib.ExitStack() as stack:
        for name, stand_in in STAND_INS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(Numbered())
        stack.enter_context(Everywhere())
        yield
