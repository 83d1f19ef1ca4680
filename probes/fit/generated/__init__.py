"""Sentences written for Telltale, from which sources draw rows with a seed: data and grammar, no model and no set."""
