"""What came of a run: accuracy, and what is left of the pre-training."""
