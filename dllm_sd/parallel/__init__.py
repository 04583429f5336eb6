"""Many processes: what they decide together, and how weights are split among them."""
