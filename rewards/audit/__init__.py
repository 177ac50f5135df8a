"""What likely went wrong in a file of rollouts: findings, a table, a page."""
