"""Judging that cannot hang; see `pool`."""

from rewards.pool.pool import DEFAULT_LIMIT as DEFAULT_LIMIT
from rewards.pool.pool import VerifierPool as VerifierPool
from rewards.pool.pool import shared_pool as shared_pool
from rewards.pool.pool import verify as verify
