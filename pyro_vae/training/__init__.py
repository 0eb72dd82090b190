"""Training by SVI, and the run directory it leaves."""
