"""Training: the loop, the step, the order of the samples, the schedule, the request to stop."""
