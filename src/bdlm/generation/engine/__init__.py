"""The engine: requests in, events out, many rows in one forward pass."""
