"""Training: what every back-end shares (trainer, plan, presets, prices) and the local one."""
