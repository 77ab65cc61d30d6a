"""What carries one run out."""
