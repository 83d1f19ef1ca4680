"""Label-free repair of a detector: its directions carried over to a new build of its model by a ridge map."""
