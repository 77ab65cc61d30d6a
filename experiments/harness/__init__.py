"""What runs any experiment."""
