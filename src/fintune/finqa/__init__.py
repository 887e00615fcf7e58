"""The FinQA program language: parse, execute, compare, prompt. Standard library only (sympy for symbolic equality)."""
