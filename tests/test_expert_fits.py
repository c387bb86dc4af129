"""A dense target learns from a source with experts, and a target with experts from a dense source."""
