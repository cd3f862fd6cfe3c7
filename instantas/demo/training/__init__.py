"""How the embedded model was made: pictures, captions, autoencoder, diffusion model."""
