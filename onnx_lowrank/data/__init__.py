"""Samples: read them from files or a callable, draw random ones, shapes, labels and masks."""
