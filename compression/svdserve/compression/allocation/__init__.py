"""Which module gets which rank under one budget."""
