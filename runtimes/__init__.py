"""What runs a graph: training, generation, evaluation, and one module or folder a target backend."""
