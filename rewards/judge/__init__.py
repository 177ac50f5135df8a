"""A language model as judge, for answers that no rule can check; see `judge`."""

from rewards.judge.judge import Judge as Judge
from rewards.judge.judge import Judgement as Judgement
from rewards.judge.judge import JudgeQuestion as JudgeQuestion
