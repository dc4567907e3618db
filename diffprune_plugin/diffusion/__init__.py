"""The training objective: noise, timesteps, the loss, the inputs of the model."""
