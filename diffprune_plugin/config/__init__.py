"""What users write, checked: this tool's configs and other tools'."""
