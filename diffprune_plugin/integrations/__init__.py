"""Doors into other tools: each file is imported by its host only, and imports it."""
