"""Optimizers that step the penalties apart from the loss, around another Keras optimizer."""
