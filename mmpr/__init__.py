"""Preference data: questions -> rollouts -> verdicts -> pairs (MMPR's format) and RL questions.

    questions.jsonl --sample--> rollouts.jsonl --verify--> verdicts.jsonl --pair----> pairs.jsonl
                                                                        `--select--> rl.jsonl

Each arrow is one command (`mmpr --help`) and one module of pure functions.
"""
