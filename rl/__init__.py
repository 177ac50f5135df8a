"""Online reinforcement learning: GSPO on groups of verified rollouts (arXiv 2507.18071)."""
