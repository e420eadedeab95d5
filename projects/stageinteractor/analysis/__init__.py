"""What a trained model does: figures, records and pages."""
