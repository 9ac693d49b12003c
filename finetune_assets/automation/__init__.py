"""What starts by itself: jobs, the weekly schedule and the sensors."""
