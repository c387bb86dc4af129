"""What turns prompts into vectors, one encoder a file."""
