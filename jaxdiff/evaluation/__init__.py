"""How good images are: features, their moments, and the scores made of them. Knows no model and no run."""
