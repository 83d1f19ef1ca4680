"""Judging a detector: figures with intervals, what stands beside them, the report and its verdict."""
