"""A plugin for diffprune-plugin: the UNet of PyPI's adaptive-terrain-diffusion, and its adapter."""

from diffprune_terrain.unet import TerrainUNet

__all__ = ["TerrainUNet"]
