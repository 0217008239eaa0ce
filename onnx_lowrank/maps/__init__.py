"""Linear maps in a graph: find them, and rewrite them as pairs."""
