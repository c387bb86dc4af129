"""Written adapters and merged models, made from an adapter and the base that it has."""
