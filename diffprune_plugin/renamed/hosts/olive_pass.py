"""Was the home of Olive's pass."""

import warnings

from diffprune_plugin.integrations.olive_pass import DiffPrune, dummy_inputs, io_config, load_unet, main

__all__ = ["DiffPrune", "dummy_inputs", "io_config", "load_unet"]
warnings.warn("diffprune_plugin.hosts.olive_pass is now .integrations.olive_pass", DeprecationWarning, stacklevel=2)

if __name__ == "__main__":
    main()
