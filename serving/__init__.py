"""Running: the engine, the HTTP server and the command line around the monitor."""

__all__ = ["__version__"]

__version__ = "0.1.0"
