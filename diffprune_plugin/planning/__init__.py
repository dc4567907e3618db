"""Which channels go: the plan."""
