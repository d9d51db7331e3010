"""How a model is trained: state, optimizers, checkpoints and what is watched."""
