"""How a network is read at some sites, and changed for a while."""
