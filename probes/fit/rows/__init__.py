"""The rows that detectors are made and judged with: where they come from, and on which side each stands."""
