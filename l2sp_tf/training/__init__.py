"""One run: a model is fine-tuned by a recipe."""
