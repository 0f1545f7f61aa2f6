"""jaxdiff: image generators in JAX, from the first DDPM to Stable Diffusion."""
