"""Find out what an adapter is for, without data: what it was trained to say, and prompts that ask for it."""
