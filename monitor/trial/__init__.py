"""Trying a policy on recorded scores: the cases, a bank that gives them, and what the monitor decides."""
