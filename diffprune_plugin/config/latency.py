"""On which runtime a latency counts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from diffprune_plugin.config.base import PathText
from diffprune_plugin.planning.widths import FUSES, runtime_name
from diffprune_plugin.utils.checked import Checked


class LatencyConfig(Checked):
    """The keys of a config's ``latency``."""

    provider: str = Field(default="cpu", description="cpu, cuda, tensorrt or openvino, as `diffprune bench` has them.")
    dtype: Literal["fp32", "fp16"] = Field(default="fp32", description="Of the ONNX file.")
    batch: int = Field(default=1, ge=1, le=4096, description="Samples a call.")
    size: int | None = Field(
        default=None, ge=1, le=65536, description="Side of a sample (latents of a latent model); default: the model's."
    )
    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads; spinning is off.")
    options: dict[str, str | int] = Field(
        default={}, description="Options of the provider, as ONNX Runtime spells them: {prefer_nhwc: 1}."
    )
    fuse: bool = Field(
        default=False,
        description="With fused operators (`diffprune-export --fuse`): round_to: auto then keeps their kernels too.",
    )
    table: PathText | None = Field(
        default=None,
        description="JSON file of the measured pieces: those of the same provider, versions and device are read, new "
        "ones added, so that another budget measures little.",
    )

    @model_validator(mode="after")
    def _fuses(self) -> Self:
        if self.fuse and self.provider.partition(":")[0] not in FUSES:
            raise ValueError(f"fuse: true: fused operators are for provider: {' or '.join(FUSES)}, not {self.provider}")
        return self

    @property
    def spec(self) -> str:
        """The provider with its options, as an export reads them."""
        given = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.provider}{',' if ':' in self.provider else ':'}{given}" if given else self.provider

    @property
    def runtime(self) -> str:
        """The row of the table of kernels, where there is one."""
        return runtime_name(self.provider, self.dtype, self.fuse)
