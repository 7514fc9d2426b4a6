"""The layouts of this package, one file each, both directions in it. Importing a file registers its layouts."""
