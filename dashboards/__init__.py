"""Watching: dashboards and alert rules, generated from the catalogue of metrics."""
