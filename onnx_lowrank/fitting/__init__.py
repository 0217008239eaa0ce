"""Factors fitted to data: moments, spectra, fit, refit, Fisher information and healing."""
