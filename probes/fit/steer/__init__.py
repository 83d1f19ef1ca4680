"""Steering directions offline: made of pairs, measured at several strengths, and whether the model uses them."""
