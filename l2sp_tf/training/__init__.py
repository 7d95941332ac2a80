"""One run: fine-tunes a model by a recipe."""
