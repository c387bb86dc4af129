"""Ways to find the adapter for a prompt behind one interface, one a file."""
