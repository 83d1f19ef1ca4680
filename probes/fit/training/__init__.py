"""Making a detector: a recipe, the search over layers and fitters, the fit, the artifact."""
