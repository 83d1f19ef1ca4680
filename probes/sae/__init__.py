"""Sparse autoencoders: their latents are read as detectors, written as steers and shown as explanations."""
