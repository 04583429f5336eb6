"""What a method has to teach, measured before it trains: accuracies, signal, controls, and a verdict in words."""

from dllm_sd.probing.probe import Probe
from dllm_sd.probing.verdict import Findings

__all__ = ["Findings", "Probe"]
