"""Two models compared: their outputs, metrics of the difference, and their latencies."""
