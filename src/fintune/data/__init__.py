"""Rows of the outside world turned into the records of `fintune.records`."""
