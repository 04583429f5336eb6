"""Decoding: the settings, the samplers, and the queue of jobs that a decoder completes."""
