"""How a model is trained: config, step, gradients, what is trained, state, optimizers."""
