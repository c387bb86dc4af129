"""Transfers: what belongs to a pair of bases, and the sequence of stages that moves an adapter between them."""
