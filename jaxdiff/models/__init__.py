"""Networks (Flax Linen)."""
