"""Which layers' channels go together, and what each layer costs."""
