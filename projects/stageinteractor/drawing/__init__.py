"""Pictures: boxes, curves, detections and videos."""
