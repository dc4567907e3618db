"""What the entry point names: the hook."""

from diffprune_plugin import hookimpl


@hookimpl
def diffprune_register_adapters(register):
    from diffprune_terrain.adapter import TERRAIN_UNET

    register(TERRAIN_UNET)
