"""Deciding: numbers in, decisions out. Knows no engine and no HTTP."""
