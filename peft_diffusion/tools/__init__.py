"""Tools on adapter files, without a base where they can: convert, verify."""
