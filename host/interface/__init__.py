"""What reaches the person at the graph."""
