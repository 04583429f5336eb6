"""The laboratory: each paper's claim, tested fairly on small models, with results as data."""
