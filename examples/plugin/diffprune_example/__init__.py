"""A plugin for diffprune-plugin: a Fisher criterion, and a UNet class with its adapter."""

from diffprune_example.unet import GatedUNet

__all__ = ["GatedUNet"]
