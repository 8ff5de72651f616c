"""What every result shares: its file, its table and figures on paper, the page and the terminal."""
