"""Networks in whose features two sets of images are compared, and the distances between the sets.

Networks come as ONNX, Inception's weights as safetensors. TorchScript, .pt2 and .pth files hold pickles and are not
opened.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffprune_plugin.errors import BadInput, CheckFailed, first_line
from diffprune_plugin.utils.optional import need

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance: arXiv 1801.01401
KERNEL_LEAST = 50  # images in a set for the kernel distance: see `kernel_distance`
CONVERT = "torch.onnx.export(network, images, FILE, dynamo=True, dynamic_shapes=({0: 'batch'},))"


@dataclass(frozen=True)
class Features:
    """A feature network: ``network`` maps uint8 images (count, channels, height, width) to floats (count, size).

    frechet, kernel: names of the two distances; FID and KID are Inception's alone.
    """

    frechet: str
    kernel: str
    sha256: str
    network: nn.Module = field(repr=False)

    def least_images(self, size: int) -> dict[str, int]:
        """By distance, how many images each set needs, for features of this size: the Frechet distance more than there
        are features, else a covariance is singular."""
        return {self.frechet: size + 1, self.kernel: KERNEL_LEAST}

    @torch.no_grad()
    def of(self, images: Tensor, batch_size: int) -> Tensor:
        """Features of uint8 images (count, channels, height, width), float64 (count, size).

        Raises BadInput for a network that does not take the images or does not give one row an image, CheckFailed for
        features that are not finite.
        """
        parts = []
        for part in torch.split(images, batch_size):
            values = self.network(part)
            if values.ndim != 2 or len(values) != len(part):
                raise BadInput(
                    f"--features: {len(part)} images give an output {tuple(values.shape)}, not (images, features); "
                    "flatten or pool it inside the network"
                )
            parts.append(values.double())
        features = torch.cat(parts)
        if not bool(torch.isfinite(features).all()):
            raise CheckFailed("--features: the network's output is not finite; check its weights and its input's scale")
        return features


def load_features(path: Path) -> Features:
    """The network in an .onnx file, or Inception with the weights in a .safetensors file.

    Raises BadInput for anything else, and for a file that is damaged or no such network.
    """
    if not path.is_file():
        raise BadInput(f"--features: {path}: no such file; give an .onnx file or Inception's weights as .safetensors")
    if path.suffix == ".onnx":
        network = OnnxNetwork(path)
        return Features(f"FD ({path.stem})", f"KD ({path.stem})", digest([path, *weights_of(path)]), network)
    if path.suffix == ".safetensors":
        return Features("FID", "KID", digest([path]), inception(path))
    raise BadInput(
        f"--features: {path}: neither .onnx nor .safetensors; TorchScript, .pt2 and .pth hold pickles, which are never "
        f"opened here: convert it once with {CONVERT}"
    )


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other."""
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


def weights_of(path: Path) -> list[Path]:
    """The files beside an ONNX file that hold its weights, as torch.onnx.export writes them."""
    tensors = need("onnx").load(str(path), load_external_data=False).graph.initializer
    names = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return [path.parent / name for name in sorted(names)]


class OnnxNetwork(nn.Module):
    """One image input, and the output ``features`` or the only one, on ONNX Runtime's CPU provider.

    A uint8 input gets pixels from 0 to 255, a float one from 0 to 1; grey images become RGB where three channels are
    taken.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        runtime = need("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BadInput(f"--features: {path}: no ONNX file that can run: {first_line(error)}") from None
        inputs, outputs = self.session.get_inputs(), [output.name for output in self.session.get_outputs()]
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in ("tensor(uint8)", "tensor(float)"):
            found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise BadInput(f"--features: {path}: takes {found}; not one uint8 or float32 (batch, channels, h, w)")
        if len(outputs) > 1 and "features" not in outputs:
            raise BadInput(f"--features: {path}: outputs {', '.join(outputs)}; name the one to use 'features'")
        self.input, self.output, self.path = inputs[0], "features" if "features" in outputs else outputs[0], path

    def forward(self, images: Tensor) -> Tensor:
        if self.input.shape[1] == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        for taken, given in zip(self.input.shape, images.shape, strict=True):
            if isinstance(taken, int) and taken != given:
                raise BadInput(
                    f"--features: {self.path}: takes {self.input.shape}, the images are {list(images.shape)}; resize "
                    f"inside the network and leave the batch open: {CONVERT}"
                )
        values = images if self.input.type == "tensor(uint8)" else images.float() / 255
        try:
            return torch.from_numpy(self.session.run([self.output], {self.input.name: values.numpy()})[0])
        except Exception as error:
            raise BadInput(f"--features: {self.path}: cannot take {list(images.shape)}: {first_line(error)}") from None


def inception(path: Path) -> nn.Module:
    """torch-fidelity's port of the Inception that FID is defined by, its 2048 features, with weights from safetensors.

    Raises MissingExtra without torch-fidelity, BadInput for weights of another network.
    """
    module = need("torch_fidelity.feature_extractor_inceptionv3")
    try:
        state = load_file(path)
        # Its constructor would download the weights, or unpickle them.
        with mock.patch.object(module, "load_state_dict_from_url", return_value=state):
            return Inception(module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise BadInput(f"--features: {path}: not the weights of FID's Inception: {first_line(error)}") from None


class Inception(nn.Module):
    """uint8 images (count, 1 or 3, height, width) to (count, 2048)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise BadInput(f"--features: Inception takes RGB or grey, the images have {images.shape[1]} channels")
        features: Tensor = self.network(images.expand(-1, 3, -1, -1))[0]
        return features


class Given(nn.Identity):
    """For torchmetrics: the features are computed already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """|mean difference|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)) of features (count, size); arXiv 1706.08500, by
    torchmetrics. Wants more images than features, else a covariance is singular."""
    metric = need("torchmetrics.image.fid").FrechetInceptionDistance(Given(real.shape[1]))
    return float(compared(metric, real, drawn))


def kernel_distance(real: Tensor, drawn: Tensor, seed: int) -> tuple[float, float]:
    """Squared MMD with the kernel (x y / size + 1)^3, unbiased: mean and standard deviation over random subsets of up
    to half the smaller set; arXiv 1801.01401, by torchmetrics.

    The spread of the mean over sets falls as 1 / images. In the features of benchmarks/digits_classifier.onnx digits
    and other digits lie 0 +- 441 apart if there are 4 of each, 0 +- 103 of 16, 0 +- 31 of 50, and digits and mirrored
    digits 105: from about 50 on such a difference, which anyone sees, is three times the chance one.

    Raises BadInput for fewer than 50 images in a set.
    """
    fewest = min(len(real), len(drawn))
    if fewest < KERNEL_LEAST:
        raise BadInput(
            f"kernel distance: {fewest} images in a set; it needs at least {KERNEL_LEAST}: with fewer, chance "
            "hides differences that anyone sees"
        )
    size = min(SUBSET_SIZE, fewest // 2)
    with warnings.catch_warnings():  # that it keeps all features in memory
        warnings.simplefilter("ignore", UserWarning)
        kind = need("torchmetrics.image.kid").KernelInceptionDistance
        metric = kind(Given(real.shape[1]), subsets=SUBSETS, subset_size=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = compared(metric, real, drawn)
    return float(mean), float(deviation)


def compared(metric: Any, real: Tensor, drawn: Tensor) -> Any:
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    return metric.compute()
