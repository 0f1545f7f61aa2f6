"""Data: sources, transforms and a random-access loader."""
