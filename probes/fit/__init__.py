"""Training, calibrating and measuring detectors, offline. Nothing that serves a request imports it."""
