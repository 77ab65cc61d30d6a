"""What a run is, and what its record says. Standard library only."""
