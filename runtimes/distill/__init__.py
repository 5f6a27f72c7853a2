"""What a teacher says of a text, written to disk once and read by every student.

layout      what a cache holds: tensors, shapes, bytes
shards      its files: written whole or not at all, hashed, checked
negatives   tokens beside the likeliest ones, drawn without a generator's state
sequences   the rows of the text
thinking    chats with and without thoughts
teacher     a graph that answers with its likeliest tokens
writer      makes a cache, or goes on where it was killed
targets     what of a cache a loss reads
reader      batches for training and evaluation
"""
