"""Image folders, their captions, aspect buckets and the cache of latents. Only `latents` imports torch."""
