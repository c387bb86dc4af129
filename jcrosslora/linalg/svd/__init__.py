"""Truncated SVD with the individual singular vectors exact, and a statement of how exact. One kernel a file.

Every kernel is `kernel(w, rank, *, vectors=True, guard=0) -> TruncatedSVD` for one matrix; `choose.decompose` runs a
stack of them, looks at what they say of their own error, and redoes what is not good enough.
"""
