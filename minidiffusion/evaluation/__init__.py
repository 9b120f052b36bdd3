"""How good pictures are: features, distances, agreement, and their floors."""
