"""What is measured while a run learns, and when it should end."""
