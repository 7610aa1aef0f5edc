"""What makes a run fast, safe and visible; the method can be read and changed without opening it."""
