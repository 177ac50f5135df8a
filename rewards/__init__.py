"""Verdicts: does a completion's final answer match the gold answer?

    completion -> extract (final answer, was the format followed?) -> match (score) -> Verdict

No torch is imported here, and nothing that comes from data is ever evaluated as code.

>>> from rewards import verify
>>> verify("The bar is 7. Final Answer: 7", "7")
Verdict(outcome=<Outcome.CORRECT: 'correct'>, extracted='7', matcher='number', score=1.0, \
format_ok=True, reason=None)
"""

from rewards.datasets import DatasetTable, load_table
from rewards.extract import STYLES, Extraction, extract
from rewards.match import MATCHERS, CannotJudge
from rewards.pool import VerifierPool, verify
from rewards.verdict import Outcome, Task, Verdict, request_fault, task_of

__all__ = [
    "MATCHERS",
    "STYLES",
    "CannotJudge",
    "DatasetTable",
    "Extraction",
    "Outcome",
    "Task",
    "Verdict",
    "VerifierPool",
    "extract",
    "load_table",
    "request_fault",
    "task_of",
    "verify",
]
