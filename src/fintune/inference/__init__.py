"""One prediction protocol, several engines."""
