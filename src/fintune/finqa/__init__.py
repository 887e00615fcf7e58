"""The FinQA program language: parse, execute, compare, prompt, score. Needs only the standard library and sympy."""
