"""What all results share: their file, their table and figures on paper, the page and the terminal."""
