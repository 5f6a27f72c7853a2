"""Graph rewrites, one per file. A recipe names a pass by its file: ``quantize-base``."""
