"""`python -m diffprune_plugin.cli`: the command `diffprune` in one process."""

from diffprune_plugin.cli import main

if __name__ == "__main__":
    main()
