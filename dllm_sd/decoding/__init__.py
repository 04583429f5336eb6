"""How tokens are chosen: the settings, the samplers, the queue that they serve."""
