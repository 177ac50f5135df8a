"""The one trainer: packs examples into micro-batches, and is blind to the algorithm."""
