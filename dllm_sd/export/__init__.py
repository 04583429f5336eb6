"""Export of trained weights: as a PEFT adapter, merged, or in the checkpoint's original format."""
