"""Truncated SVD with accurate individual singular vectors and an error estimate; one kernel per file.

A kernel is `kernel(w, rank, *, vectors=True, guard=0) -> TruncatedSVD` for one matrix. `choose.decompose` runs a kernel
over a stack of matrices and redoes those whose estimated error is above the tolerance.
"""
