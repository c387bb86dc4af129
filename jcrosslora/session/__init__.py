"""Transfers: the session of a pair of bases, and the stages that move an adapter between them."""
