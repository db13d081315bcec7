"""Checkpoints: which tensors make expert (layer, e), and reading one expert. See `recipe.py` for the values."""
