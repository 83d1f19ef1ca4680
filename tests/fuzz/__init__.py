"""Readers of files that come from others, fed with damaged ones."""
