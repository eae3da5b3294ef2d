"""The training library and the `solomonov` command. Importing it imports nothing heavy; take names from its modules."""
