"""The loss over timesteps, and the gradients of those that count."""
