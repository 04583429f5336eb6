"""Where the rollouts of an update come from: problems, weights, texts, banks."""
