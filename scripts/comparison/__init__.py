"""What `compare.py` runs, and the page it makes of it."""
