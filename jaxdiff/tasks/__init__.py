"""What is trained: each task assembles a model, a loss and a sampler."""
