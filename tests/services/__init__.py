"""Tests against real services; `make test-services` runs them."""
