"""What the entry point names: the hooks."""

from diffprune_plugin import hookimpl


@hookimpl
def diffprune_register_criteria(register):
    from diffprune_example.fisher import Fisher

    register("fisher_example", Fisher)


@hookimpl
def diffprune_register_adapters(register):
    from diffprune_example.adapter import GATED_UNET

    register(GATED_UNET)
