"""The rows of an adapter's table: one fact each about layers, attributes or configs of a model class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffprune_plugin.adapters.ports import Config


@dataclass(frozen=True)
class Heads:
    """Attention of class ``owner`` splits the outputs of ``layers`` into as many heads as its attribute ``count`` says.

    Heads lose equally many dimensions each; the softmax keeps the dense scale: ``query``'s weights are multiplied by
    sqrt(new / old head size), which cancels the 1/sqrt(head size) that scaled_dot_product_attention applies, and the
    attribute ``scale``, which other processors read, is set to 1/sqrt(new head size).
    ``whole``: heads go whole or stay, since something (rotary positions, a norm over a head's dimensions) ties the
    dimensions of all heads. ``norms``: layers with one weight for all heads, which whole heads leave as it is.
    ``widths``: attributes that repeat the width of all heads together. ``value``: the layer that is multiplied with the
    softmax, where MACs are to count the attention's products; published MACs of UNets do not. Layers that an owner
    lacks are left out.
    """

    owner: str
    count: str
    layers: tuple[str, ...]
    query: str
    scale: str = ""
    whole: bool = False
    norms: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    value: str = ""


# Joint attention of two streams: the projections of both, and the norms over a head's dimensions.
JOINT = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
JOINT_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


@dataclass(frozen=True)
class Pairs:
    """The output of ``layer`` in modules of class ``owner`` is cut into ``parts`` whose channels go together.

    ``when``: only in owners whose attribute has this value.
    """

    owner: str
    layer: str
    parts: int
    when: tuple[str, str] | None = None


@dataclass(frozen=True)
class Keep:
    """Layers, by pattern, whose output channels must stay ``when`` the config says so, and in words ``why``: by default
    since something of a fixed width that comes from outside is added to them."""

    layers: str
    when: Callable[[Config], bool]
    why: str = "kept: the adapter says that its width is the output's"


@dataclass(frozen=True)
class Mirror:
    """``attribute`` of modules of class ``owner`` repeats the size ``source`` and goes stale when that shrinks."""

    owner: str
    attribute: str
    source: str


@dataclass(frozen=True)
class Known:
    """The values (or items, if it is a list) of config key ``key`` that the table covers; others are refused."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Refused:
    """Configs, those for which ``when`` holds, that are refused by their ``key``, its value, and ``why``, in words."""

    key: str
    when: Callable[[Config], bool]
    why: str | Callable[[Config], str]
