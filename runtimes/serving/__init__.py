"""Checkpoints of GPU servers: what each holds, what is written, and the graph that computes what a server computes.

settings    what can be asked for, without torch
plan        which weights of a graph are written how, and what stands in the way
held        what packed weights can be written as
caches      the scales of keys and values
gguf        the same plan for a GGUF file
ternary     ternary weights in two bits
layout      the tensors of a weight in a checkpoint, by dialect
config      what config.json says of them
reference   the graph with weights and activations as they are served
"""
