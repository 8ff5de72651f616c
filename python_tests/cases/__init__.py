"""What several tests share: planted inputs, small models and SAEs, oracles; no tests."""
