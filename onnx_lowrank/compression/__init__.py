"""One run of the tool, from a model file to a smaller one with its report."""
