"""Lowering of a graph to ONNX, and running what was written; ``runtimes.export.onnx`` writes the folder.

program   the model while it is written: nodes, and tensors whose values are not asked for yet
lowering  the table op -> function; pointwise, shaping, indexing and blocks fill it
weights   what a linear multiplies with, kept packed
file      the model on disk, its weights beside it
session   the model in ONNX Runtime
"""
