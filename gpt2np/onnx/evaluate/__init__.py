"""A graph run in NumPy."""
