"""The gated rank-one edit: gates, key locks, covariance."""
