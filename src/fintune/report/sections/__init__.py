"""The sections of the run page and of the score page."""
