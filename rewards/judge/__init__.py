"""A language model as judge, for answers that no rule can check; see `judge`."""

from rewards.judge.cache import JudgeCache as JudgeCache
from rewards.judge.cache import JudgeCacheError as JudgeCacheError
from rewards.judge.judge import Judge as Judge
from rewards.judge.judge import Judgement as Judgement
from rewards.judge.judge import JudgeQuestion as JudgeQuestion
