"""What a model is worth: images from the same noise, losses, distances."""
