"""Numerics on plain arrays: spectra, ranks and factors.  Nothing here knows a graph."""
