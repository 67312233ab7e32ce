"""The recurrences in operations that autograd records: strong gates, two gates, and the delta rule."""
