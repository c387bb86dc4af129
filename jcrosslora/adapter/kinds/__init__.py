"""Kinds of adapter: one small file for each that turns what it stores into A and B, one table of those refused."""
