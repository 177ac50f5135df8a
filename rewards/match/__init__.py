"""Does a prediction match a gold answer? One file a family of matchers; `table` names them all."""

from rewards.match.reasons import CannotJudge as CannotJudge
from rewards.match.table import MATCHERS as MATCHERS
from rewards.match.table import Matcher as Matcher
from rewards.match.table import get_matcher as get_matcher
