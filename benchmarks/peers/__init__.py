"""Peers, each as its users run it. They are no dependency of the project: `measure.peer` runs them with another interpreter."""
