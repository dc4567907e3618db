"""Was: `accelerate launch -m diffprune_plugin.finetune CONFIG`."""

from diffprune_plugin.__main__ import renamed

if __name__ == "__main__":
    renamed("finetune")
