"""Experiments on what the model can do: each one command, with controls, several seeds and the figures kept as JSON."""
