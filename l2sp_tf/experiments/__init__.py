"""Many runs: plans, cross-validation, and one record for each run."""
