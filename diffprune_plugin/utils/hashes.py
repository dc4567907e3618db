"""Hashes of facts."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def json_hash(facts: Any) -> str:
    """SHA-256 of facts as JSON has them, whatever the order of their keys; what JSON does not know counts as text."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
