"""What methods share: their two base classes, and for those with maps the evidence, the alignment and the shift."""
