"""What operators see: metrics, logs, times."""
