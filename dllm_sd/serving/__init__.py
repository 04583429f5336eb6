"""A policy behind HTTP."""
