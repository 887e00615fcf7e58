"""The work of the verbs that have no run."""
