"""How much each channel matters to the model's output: what a budget is spent by."""
