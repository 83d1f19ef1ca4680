"""Stores of sessions: in memory, or in a database that several processes share."""
