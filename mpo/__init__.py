"""Mixed preference optimisation: DPO + BCO + SFT on preference pairs (arXiv 2411.10442)."""
