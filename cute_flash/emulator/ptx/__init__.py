"""The text of a PTX module: operands, instructions, entries, and what is constant in them."""
