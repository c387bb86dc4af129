"""LoRA-Align: two bases in, the maps between their modules out. No adapter has a part in it."""
