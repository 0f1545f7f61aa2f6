"""How anything is trained: state, step, sharding, loop, checkpoints, logging."""
