"""Mathematics only: least squares, sums, intervals, correlations, power law. Knows no SAE, no model and no file."""
