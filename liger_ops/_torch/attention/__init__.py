"""Windowed attention with sinks, alone and in one softmax with a recurrence over what has left the window."""
