"""The model, its optimizer and its schedule."""
