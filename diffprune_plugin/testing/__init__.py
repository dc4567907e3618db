"""For the tests of whoever writes a criterion or an adapter: what does not hold is a CheckFailed that names it."""

from diffprune_plugin.testing.adapters import check_adapter
from diffprune_plugin.testing.criteria import check_criterion

__all__ = ["check_adapter", "check_criterion"]
