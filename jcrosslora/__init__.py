"""Move a LoRA adapter from one base model to a different one, without training data."""
