"""LoRA-Shift: a transport and an adapter in, an adapter for the other base out."""
