"""Was the home of `check_criterion` and `check_adapter`."""

import warnings

from diffprune_plugin.testing import check_adapter, check_criterion

__all__ = ["check_adapter", "check_criterion"]
warnings.warn("diffprune_plugin.check is now diffprune_plugin.testing", DeprecationWarning, stacklevel=2)
