"""Evidence for methods: its records, and the providers that collect it from two bases."""
