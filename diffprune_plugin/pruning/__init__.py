"""The plan carried out: channels removed, or held at zero; saved and loaded."""
