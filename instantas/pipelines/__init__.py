"""All that knows diffusers: the pipeline, regional prompts in a UNet's cross-attention, conditions, the autoencoder."""
