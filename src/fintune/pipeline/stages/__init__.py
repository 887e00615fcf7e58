"""One verb a file; each is a function from a configuration and the artifacts before it to an artifact."""
