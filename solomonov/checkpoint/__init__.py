"""Verified, topology-free checkpoints: fragments of flattened tensors in safetensors, a manifest in JSON, nothing executable."""
