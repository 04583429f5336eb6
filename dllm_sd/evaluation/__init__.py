"""How good a model is: attempts decoded, graded, recorded and compared."""
