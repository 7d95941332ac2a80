"""Evaluation of a run: accuracy, and how much of the pre-training is left."""
