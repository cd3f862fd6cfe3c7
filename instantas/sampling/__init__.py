"""The sampling loop: its steps, the bridges between windows, the schedulers' recurrences, noise levels and graphs."""
