"""The mathematics of diffusion: noise schedules, predictions, guidance, samplers, likelihood."""
