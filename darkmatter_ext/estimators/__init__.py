"""Mathematics only: least squares, sums, intervals, correlations, power law. Knows nothing about SAEs, models or files."""
