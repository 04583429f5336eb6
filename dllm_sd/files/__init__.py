"""Files: read in bounded pieces, written whole or not at all, locked by one process."""
