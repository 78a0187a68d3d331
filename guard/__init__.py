"""What a direction means: banks, scores, calibration, verdicts, policies. Knows no HTTP."""
