"""Our routes and the layer over all routes, on vLLM's own server."""
