"""Recipes: the YAML files here, and what reads them. Nothing is imported until it is asked for."""
