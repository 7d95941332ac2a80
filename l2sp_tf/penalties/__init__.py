"""Section 3: the penalties, their anchors w0, and the weights that they are bound to."""
