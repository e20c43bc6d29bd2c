"""What operators look at. It has no models of its own."""
