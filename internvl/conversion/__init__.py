"""Checkpoints from one layout to the other, and adapters into their base.

convert (a folder) and merge (an adapter); behind them: layouts (tensor names), published (config),
processors and templates (tokenizer, chat template), internlm2 (its tokenizer), shards (the bytes of
weights), originals (what the other layout had besides).
"""
