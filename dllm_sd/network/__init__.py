"""The network: logits at some sites, and temporary changes of its weights."""
