"""What the server costs: an engine that computes nothing, clients that count every frame, and turns in pairs."""
