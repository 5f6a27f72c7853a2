"""Checkpoints of GPU servers: what each holds, what is written, and the graph that computes what a server computes.

settings    what can be asked for, without torch
plan        which weights of a graph are written how, and what stands in the way
layout      the tensors of a weight in a checkpoint, by dialect
config      what config.json says of them
reference   the graph with weights and activations as they are served
"""
