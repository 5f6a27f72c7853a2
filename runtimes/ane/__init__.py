"""Core ML packages for the Apple Neural Engine: what of a graph goes where, and the ops it becomes.

plan      parts, cuts, caches, and all that stands in the way, from shapes alone
lowering  one part's ops of the graph, written to an emitter through a table op -> function
mil       the emitter that writes Core ML packages, the only one that knows coremltools
"""
