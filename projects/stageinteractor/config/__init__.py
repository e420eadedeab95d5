"""What a config file, the command line and a person's own data make of a run."""
