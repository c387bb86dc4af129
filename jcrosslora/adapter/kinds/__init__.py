"""Kinds of adapter: one small file a kind turns its tensors into A and B; one table lists those that are refused."""
