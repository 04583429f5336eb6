"""The equation: what is graded in an update, and the loss of it."""
