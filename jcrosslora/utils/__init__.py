"""Atomic writing of files, errors of memory, and HTML tables."""
