"""From a config and weights to a model that is ready to run."""
