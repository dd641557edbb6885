"""The law of capacity gap: a table of distilled students, fits to it, and the teacher that they recommend. No torch."""
