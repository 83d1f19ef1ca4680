"""What a SAE's latents stand for: statistics of where they are active. Offline; needs the model."""
