"""Write adapters in other profiles, and merge them into their base."""
