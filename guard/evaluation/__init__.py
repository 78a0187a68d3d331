"""How well a bank detects: what was measured, and the report that shows it. Needs no torch to read or to show."""
