"""A source behind an OpenAI-compatible server: requests, what servers differ in, and answers."""
