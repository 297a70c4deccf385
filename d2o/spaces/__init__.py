"""The spaces that diffusion models work in: pixels, and the latents of autoencoders."""
