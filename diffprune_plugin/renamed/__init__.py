"""Modules by their names of before: this folder is on the package's path (`diffprune_plugin.prune` and others)."""
