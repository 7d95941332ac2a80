"""The penalties' own steps, around the step of another Keras optimizer."""
