"""The machine that a run takes place on: processes, memory and sharding."""
