"""Was the home of what is now in diffprune_plugin.integrations."""
