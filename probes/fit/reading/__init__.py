"""Reading a model offline: activations by transformers or out of a folder, token scores of any detector."""
