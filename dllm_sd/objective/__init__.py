"""The objective: which sites of an update are graded, and the loss."""
