"""Supervised fine-tuning: next-token loss on the assistant's turns."""
