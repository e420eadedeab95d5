"""What a config file, the command line and your own data make of a run."""
