"""Reading and writing activations: what to read, and what the numbers mean. Knows no engine and no HTTP."""
