"""LoRA-Align: two bases in, the maps between their modules out. It never sees an adapter."""
