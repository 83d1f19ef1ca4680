"""Thresholds and probabilities from labelled and benign requests."""
