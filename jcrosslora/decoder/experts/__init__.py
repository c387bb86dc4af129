"""Experts in place of one MLP: which of them a token goes through, and their products, grouped by expert."""
