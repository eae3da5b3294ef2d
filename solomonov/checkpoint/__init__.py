"""Verified, topology-free checkpoints: fragments in safetensors, a manifest in JSON, nothing executable."""
