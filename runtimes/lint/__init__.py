"""Lint of saved Core ML packages: what the Neural Engine is known not to take, or to compute wrongly.

rules       the table: id, severity, what is checked, source, what to do
subject     a saved function as the checks look at it
structure, weights, states, operations, numerics: the checks by family
report      running the checks over a package or an export
"""
