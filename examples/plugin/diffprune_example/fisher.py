"""Group Fisher pruning: the squared derivative of the loss by a mask on each coupled channel."""

import torch
from torch import nn

from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.errors import MissingGradients


class Fisher:
    """(sum over the coupled layers' weights and biases of w * g) ** 2, from a calibration or from ``.grad``.

    The sum is the derivative of the loss by a mask that multiplies the channel wherever it is made (Liu et al., arXiv
    2108.00708). They average its square over samples; a calibration keeps the gradients' sum only, so this is the
    square of the sum. Having a ``sweep`` makes the commands calibrate and set ``calibration``.
    """

    def __init__(self, calibration=None, **options):
        self.calibration = calibration and calibration.matching(options)
        self.sweep = self.calibration.sweep if calibration else Sweep(**options)

    @torch.no_grad()
    def __call__(self, group):
        """Score of each root channel of a torch-pruning group, shape (channels,), >= 0."""
        position = {channel: i for i, channel in enumerate(group[0].idxs)}
        derivative = torch.zeros(len(position), device=next(group[0].dep.target.module.parameters()).device)
        for item in group.items:
            layer = item.dep.target.module
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and group._DG.is_out_channel_pruning_fn(item.dep.handler):
                rows = torch.tensor([position[root] for root in item.root_idxs], device=derivative.device)
                derivative.index_add_(0, rows, self.by_mask(layer, group._DG._module2name[layer])[item.idxs])
        return derivative.square()

    def by_mask(self, layer, name):
        """Derivative of the loss by a mask on each output channel of a layer, shape (out,)."""
        total = 0
        for key, parameter in layer.named_parameters(recurse=False):
            gradient = self.calibration.gradients.get(f"{name}.{key}") if self.calibration else parameter.grad
            if gradient is None or gradient.shape != parameter.shape:
                raise MissingGradients(f"{name}.{key} has no gradient of its shape; calibrate (again) before scoring")
            saliency = parameter.float() * gradient.to(parameter.device).float()
            total = total + saliency.reshape(len(parameter), -1).sum(1)
        return total
