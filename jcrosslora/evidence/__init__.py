"""What a method may look at: the records, and what collects them from two bases."""
