"""What a table says of depth: the lists of blocks that a config counts, and named plans for a class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffprune_plugin.adapters.ports import Config

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
STREAMS = ("encoder_hidden_states", "hidden_states")  # the stream of blocks of text and image together


@dataclass(frozen=True)
class Blocks:
    """The blocks in the list ``path``, any of which may go: config key ``count`` says how many there are.

    ``numbered``: config keys that list blocks by their number. ``mend``: of the dense weights by name and the dense
    config the same, for a model whose last block is this one: where the last is made otherwise than the others.
    ``stream``: the arguments of a block that go through it, in the order in which it returns them. ``first_is_read``:
    something outside of the list reads the first, which is never chosen to go, but may be named.
    """

    path: str
    count: str
    numbered: tuple[str, ...] = ()
    mend: Callable[[State, str], State] | None = None
    stream: tuple[str, ...] = ("hidden_states",)
    first_is_read: bool = False


@dataclass(frozen=True)
class Residual:
    """Modules of the class ``owner`` that add to what goes through them, the argument ``stream``, where ``keeps`` says
    that its shape stays: any may go, and what goes in comes out. No config says which. ``wrapped``: in a tuple.
    """

    owner: str
    stream: str
    keeps: Callable[[Any], bool]
    wrapped: bool = False


@dataclass(frozen=True)
class Shallower:
    """A smaller config of the same class, and where each of its weights lies in the dense model.

    ``skipped``: the blocks, by their names, that go without a config that says so.
    """

    changes: Mapping[str, Any]
    dense_name: Callable[[str], str]
    gone: tuple[str, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class DepthPlan:
    """A published plan by its name: of a config the smaller one; raises KeyError, IndexError or ValueError where the
    config is of another shape."""

    name: str
    of: Callable[[Config], Shallower]


def adds_to_itself(resnet: Any) -> bool:
    """Whether a resnet returns its input, of the same shape, and something more."""
    sampled = resnet.upsample is not None or resnet.downsample is not None
    return resnet.conv_shortcut is None and not sampled and resnet.output_scale_factor == 1


RESIDUALS = (
    Residual("ResnetBlock2D", "input_tensor", adds_to_itself),
    Residual("Attention", "hidden_states", lambda it: it.residual_connection and it.rescale_output_factor == 1),
    Residual(
        "Transformer2DModel",
        "hidden_states",
        lambda it: it.is_input_continuous and len(it.transformer_blocks) == 1,
        wrapped=True,
    ),
    Residual("BasicTransformerBlock", "hidden_states", lambda _: True),
)


def bk_sdm(stages: int, middle: bool) -> Callable[[Config], Shallower]:
    """BK-SDM (arXiv 2305.15798): of each pair of a resnet and an attention the first stays on the way down, the first
    and the last on the way up; without ``middle`` the block at the bottom goes, and the stages below ``stages``."""

    def of(config: Config) -> Shallower:
        total, layers = len(config["down_block_types"]), config["layers_per_block"]
        if layers != 2 or total != 4:
            raise ValueError(f"BK-SDM is for 4 stages of 2 layers, this UNet has {total} of {layers}")
        less, widths = total - stages, config["block_out_channels"]
        if widths[stages - 1] != widths[-1]:
            raise ValueError(
                f"its stage {stages} has other channels than its last, {widths[stages - 1]} and {widths[-1]}"
            )
        changes: dict[str, Any] = {"layers_per_block": 1}
        for key, value in config.items():
            if isinstance(value, (list, tuple)) and len(value) == total:
                changes[key] = list(value[less:] if key.startswith(("up_block", "reverse_")) else value[:stages])
        if not middle:
            changes["mid_block_type"] = None
        kept = re.compile(r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)")

        def dense_name(name: str) -> str:
            name = kept.sub(lambda m: f"up_blocks.{m[1]}.{m[2]}.{2 * int(m[3])}", name)
            return re.sub(r"^up_blocks\.(\d+)", lambda m: f"up_blocks.{int(m[1]) + less}", name)

        pairs = ("resnets", "attentions")
        gone = [f"down_blocks.{i}.{part}.1" for i in range(stages) for part in pairs]
        gone += [f"up_blocks.{i}.{part}.1" for i in range(less, total) for part in pairs]
        gone += [] if middle else ["mid_block"]
        gone += [f"down_blocks.{i}" for i in range(stages, total)]
        gone += [f"up_blocks.{i}" for i in range(less)]
        return Shallower(changes, dense_name, tuple(gone))

    return of


BK_SDM = (
    DepthPlan("bk-sdm-base", bk_sdm(4, True)),
    DepthPlan("bk-sdm-small", bk_sdm(4, False)),
    DepthPlan("bk-sdm-tiny", bk_sdm(3, False)),
)
