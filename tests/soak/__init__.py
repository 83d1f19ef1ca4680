"""Long runs of a real server under load; `make soak`."""
