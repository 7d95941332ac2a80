"""Section 3: the penalties, the starting point w0, and the weights that they are bound to."""
