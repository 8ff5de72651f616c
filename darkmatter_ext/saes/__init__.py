"""SAELens objects, and every way from x to Sae(x)."""
