"""The final answer of a completion, and whether it kept to the format; see `styles`."""

from rewards.extract.extraction import Extraction as Extraction
from rewards.extract.options import options_in as options_in
from rewards.extract.records import whole_record as whole_record
from rewards.extract.styles import STYLES as STYLES
from rewards.extract.styles import extract as extract
