"""What the guard costs, measured in pairs."""
