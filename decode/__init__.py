"""How a trained model writes text."""
