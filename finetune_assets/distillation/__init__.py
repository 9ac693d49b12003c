"""Distillation: what a rented tuned model says becomes the training set of a local one, and how near that one comes to it."""
