"""What the tools compute and show about models, data and detections."""
