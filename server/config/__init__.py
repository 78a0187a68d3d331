"""The settings: a YAML file, then the environment."""
