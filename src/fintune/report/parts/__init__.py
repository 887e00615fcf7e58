"""The parts of a page: each turns data into what its template prints."""
