"""How an update gets graded completions."""
