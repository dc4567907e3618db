"""How long a model takes on the runtime that will serve it, and how a plan meets a latency."""
