"""Latents that tell the labels of a set apart, and what they are worth beside a probe of the raw activations."""
