"""Words to calls: the command line."""
