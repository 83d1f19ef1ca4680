"""Training sparse autoencoders, offline: corpus, rows, objectives, trainer, and how good what came out is."""
