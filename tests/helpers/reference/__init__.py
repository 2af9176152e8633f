"""The formulas of METHODS.md, written down slowly and literally, and the command's bytes held against them."""
