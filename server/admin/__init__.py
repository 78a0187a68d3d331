"""What operators see and do, on a port of its own."""
