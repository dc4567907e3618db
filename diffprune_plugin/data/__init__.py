"""Images, captions, classes, latents: the samples that a model is shown."""
