"""What clients may say, and the shapes of what they are answered."""
