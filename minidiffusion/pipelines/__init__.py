"""The user's verbs: draw, start from a picture, paint over, watch."""
