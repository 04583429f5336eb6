"""Naive transcriptions of the papers' equations, loops and all. The package never imports them."""
