"""Data sets, pictures, and the way from a picture to the model's input."""
