"""What any run stands on: files, progress, several processes. Knows no SAE."""
