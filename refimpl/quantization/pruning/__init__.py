"""Pruning: which weights of a trained model to leave out, and how to repair what is left."""
