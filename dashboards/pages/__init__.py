"""The pages; each has `layout(**query)`."""
