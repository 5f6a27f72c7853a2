"""An export for the Neural Engine, run as an app would run it, with the interpreter in the place of Core ML.

meta     what the folder holds (docs/ane.md)
inputs   positions, rotations, masks: what the host computes
decoder  prompts in blocks, then a token at a time, over the cache
encoder  texts to hidden states and embeddings
"""
