"""fintune: raw financial pages in, a measured and quantised language model out."""

__version__ = "0.1.0"
