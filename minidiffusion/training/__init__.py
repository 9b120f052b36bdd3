"""Recipes become networks: objectives, optimizers, the loop, its state, several ranks."""
