"""The one way to call a model behind an OpenAI-compatible endpoint; see `client`."""

from rewards.endpoint.cache import ReplyCache as ReplyCache
from rewards.endpoint.cache import ReplyCacheError as ReplyCacheError
from rewards.endpoint.client import INSTALL as INSTALL
from rewards.endpoint.client import Again as Again
from rewards.endpoint.client import Answer as Answer
from rewards.endpoint.client import Endpoint as Endpoint
from rewards.endpoint.client import Failures as Failures
from rewards.endpoint.client import Read as Read
from rewards.endpoint.replies import objects_in as objects_in
