"""How blends of adapters are measured: drawings, judges, ways of composing, and what is made of the scores."""
