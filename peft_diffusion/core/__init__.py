"""The shared PEFT core: an adapter is a change at a site. Imports torch and nothing else of this package."""
