"""What each decoder stage does: figures over a data set, and a record of one picture."""
