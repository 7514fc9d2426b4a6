"""What adapters do, measured: judges of drawings, curves over strength, and what adapters do to each other."""
